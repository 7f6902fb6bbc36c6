// What the stand-ins for CUDA's libraries hand over to ptx/cuda.py, which has it member for member.
#pragma once
#include <cstdint>

struct Kernel {
    const char* text;  // its PTX, or null
    const char *name, *title;  // mangled, and as C++ writes it
};
struct Launch {
    const Kernel* kernel;
    uint32_t grid[3], block[3];
    uint64_t shared;  // bytes of dynamic shared memory
    void** arguments;
};
struct Emulator {
    int (*launch)(const Launch*);
    int (*set)(const Kernel*, int attribute, int value);  // of a function: 8 and 9, dynamic shared memory and the carve-out
};
