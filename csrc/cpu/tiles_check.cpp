// Whether products by tiles are right on this processor: a sum of small whole numbers, which is exact, with an edge on each side.
// The library asks once, when it chooses an instruction set (library.cpp). And the rate of these products, for the benchmarks.
#include <time.h>

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

struct Rate {
    double products_a_second;
};
static const int ROUNDS = 2000;
// Of four sums in registers, as the kernels have them: the best of 16 tries, as others use the core, too
static void measure_rate(Rate& result, Size) {
    result.products_a_second = 0;
#if TILES
    for (int n = 0; n < 16; ++n) {
        timespec begin, end;
        clock_gettime(CLOCK_MONOTONIC, &begin);
        for (int i = 0; i < ROUNDS; ++i) {
            multiply_tile_registers(0, 4, 6);
            multiply_tile_registers(1, 4, 7);
            multiply_tile_registers(2, 5, 6);
            multiply_tile_registers(3, 5, 7);
        }
        clock_gettime(CLOCK_MONOTONIC, &end);
        const double seconds = (end.tv_sec - begin.tv_sec) + 1e-9 * (end.tv_nsec - begin.tv_nsec);
        if (4 * ROUNDS / seconds > result.products_a_second) result.products_a_second = 4 * ROUNDS / seconds;
    }
#endif
}

}  // namespace
}  // namespace ISA

EXPORT double SYMBOL(ISA, tile_products_a_second)() {
    ISA::Rate result;
    ISA::run(1, result, ISA::measure_rate);
    return result.products_a_second;
}
EXPORT bool SYMBOL(ISA, is_right)() {
    ISA::Check result = {false};
    ISA::run(1, result, ISA::check);
    return TILES && result.right;
}
