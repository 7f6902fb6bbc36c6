# The launcher of kernels that were compiled ahead: a module of Python's stable ABI (3.11 and later), without torch and CUDA's
# toolkit. It opens the driver, libcuda, when it is first used.
add_library(vlattn_launch SHARED csrc/launch/launch.cpp)
set_target_properties(vlattn_launch PROPERTIES SUFFIX .so)
target_include_directories(vlattn_launch SYSTEM PRIVATE ${VLATTN_LAUNCH})
target_link_libraries(vlattn_launch PRIVATE ${CMAKE_DL_LIBS})
target_compile_options(vlattn_launch PRIVATE -Wall -Wextra)
