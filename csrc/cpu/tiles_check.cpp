// Whether products by tiles are right on this processor: a sum of small whole numbers, which is exact, with an edge on each side.
// The library asks once, when it chooses an instruction set (library.cpp).
#include "products.h"
#include "threads.h"

namespace ISA {
namespace {

// Any whole number from -4 to 4, as bfloat16
static float number(Size n) { return (float)((n * 7 + n / 5) % 9 - 4); }
static uint16_t bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)(bits >> 16);
}

struct Check {
    bool right;
};
static void check(Check& result, Size) {
    const Size rows = 2 * TILE_SIDE + 5, columns = 3 * TILE_SIDE, depth = TILE_SIDE + 11,
               ld = depth + 1;  // two blocks of rows and of columns
    Pair A[rows * ld], B[depth * columns];
    float C[rows * columns];
    for (Size n = 0; n < rows * ld; ++n) A[n] = {bfloat16(number(n)), bfloat16(number(n + 100))};
    for (Size n = 0; n < depth * columns; ++n) B[n] = {bfloat16(number(n + 3)), bfloat16(number(n + 31))};
    for (Size n = 0; n < rows * columns; ++n) C[n] = number(n);
    product<false>(rows, columns, depth, A, ld, B, columns, C, columns, true);
    result.right = true;
    for (Size r = 0; r < rows; ++r)
        for (Size n = 0; n < columns; ++n) {
            float expected = number(r * columns + n);
            for (Size k = 0; k < depth; ++k) {
                const Size a = r * ld + k, b = k * columns + n;
                expected += number(a) * number(b + 3) + number(a + 100) * number(b + 31);
            }
            result.right &= C[r * columns + n] == expected;
        }
}

}  // namespace
}  // namespace ISA

EXPORT bool SYMBOL(ISA, is_right)() {
    ISA::Check result = {false};
    ISA::run(1, result, ISA::check);
    return TILES && result.right;
}
