// The products of csrc/cuda/mma.h by themselves, for test_products.py.
#include "mma.h"

namespace vlattn {
namespace {

// scores (rows,32) = x (rows,columns) y^T and out (rows,columns) = scores z, 16 rows a warp.
template <class T, int K>
__global__ void products(const T* x, const T* y, const T* z, float* scores, float* out, int rows, int columns) {
    T* y_tile = static_cast<T*>(shared_memory());
    T* z_tile = y_tile + 32 * tile_stride<T, K>();
    stage<T, K>(y_tile, y, columns, 0, 32, 32, columns);
    stage<T, K>(z_tile, z, columns, 0, 32, 32, columns);
    __syncthreads();
    Rows16<T, K> left;
    left.load(x, columns, warp_index() * 16, rows, columns);
    float sums[K / 8][4] = {};
    for (int k = 0; k < 32; k += 16) {
        float c[2][4] = {};
        product_with_rows<T, K>(c, left, y_tile, k);
        for (int n = 0; n < 2; ++n) {
            for (int e = 0; e < 4; ++e) {
                const int row = warp_index() * 16 + lane_row() + e / 2 * 8;
                c[n][e] = to_float(from_float<T>(c[n][e]));
                if (row < rows) scores[row * 32 + k + n * 8 + lane_column() * 2 + e % 2] = c[n][e];
            }
        }
        product_with_columns<T, K>(sums, c, z_tile, k);
    }
    for (int n = 0; n < K / 8; ++n) {
        for (int e = 0; e < 4; ++e) {
            const int row = warp_index() * 16 + lane_row() + e / 2 * 8, column = n * 8 + lane_column() * 2 + e % 2;
            if (row < rows && column < columns) out[row * columns + column] = sums[n][e];
        }
    }
}

template <class T, int K>
cudaError_t run_products(const void* x, const void* y, const void* z, float* scores, float* out, int rows, int columns) {
    const int threads = static_cast<int>(divide_up(rows, 16)) * WARP;
    return launch(products<T, K>, 1, threads, 2 * tile_bytes<T, K>(32), cudaStream_t(), static_cast<const T*>(x),
                  static_cast<const T*>(y), static_cast<const T*>(z), scores, out, rows, columns);
}

}  // namespace
}  // namespace vlattn

using namespace vlattn;

EXPORT int run_products(int type, int width, const void* x, const void* y, const void* z, float* scores, float* out, int rows,
                        int columns) {
    return with_shape(static_cast<DType>(type), width, [&](auto one, auto of) {
        return run_products<decltype(one), decltype(of)::value>(x, y, z, scores, out, rows, columns);
    });
}
