# The operators for the kernel hub and for processes without Python, by torch's stable ABI: no C++ of torch is linked, only its
# C functions.
add_library(vlattn_torch SHARED csrc/torch/operators.cpp)
set_target_properties(vlattn_torch PROPERTIES SUFFIX .so)  # as libvlattn_cpu.so, which it opens
target_include_directories(vlattn_torch SYSTEM PRIVATE ${VLATTN_TORCH}/include)
target_link_directories(vlattn_torch PRIVATE ${VLATTN_TORCH}/lib)
target_link_libraries(vlattn_torch PRIVATE torch_cpu ${CMAKE_DL_LIBS})
target_compile_definitions(vlattn_torch PRIVATE $<$<BOOL:${VLATTN_NAMESPACE}>:VLATTN_NAMESPACE=${VLATTN_NAMESPACE}>)
target_compile_definitions(vlattn_torch PRIVATE TORCH_TARGET_VERSION=0x020a000000000000)  # 2.10, the oldest that runs it
target_compile_options(vlattn_torch PRIVATE -Wall -Wextra)
if(NOT APPLE)
  target_link_options(vlattn_torch PRIVATE -Wl,--allow-shlib-undefined)  # torch's own libraries find each other when they are loaded
endif()
