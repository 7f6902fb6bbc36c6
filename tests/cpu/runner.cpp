// Runs calls of a library of the CPU's kernels in a program for another processor, which an emulator of it can run.
//
// A request comes on standard input (tests/helpers/cpu/emulated.py writes it): five numbers, the name of a kernel, its struct, and
// the memory that the struct's pointers point into. The answer is what the memory holds after the call, and what the call returns.
// A request without a struct asks how the kernel describes its struct.
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <string>
#include <vector>

static int64_t threads;  // tasks of a call; one thread runs them all

static int32_t parallel_for(int64_t begin, int64_t end, int64_t, void (*run)(int64_t, int64_t, void*), void* context) {
    run(begin, end, context);
    return 0;
}
static int32_t get_num_threads(uint32_t* count) {
    *count = threads;
    return 0;
}

static void read(void* to, size_t size) {
    if (fread(to, 1, size, stdin) != size) exit(feof(stdin) ? 0 : 2);
}
static void write(const void* from, size_t size) { fwrite(from, 1, size, stdout); }

struct Request {
    int64_t threads, name, call, pointers, memories;  // the last four: lengths
};
struct Pointer {
    int64_t at, memory, offset;  // at: in the struct
};
struct Memory {
    int64_t address, size;  // in Python's process
    char* here;
};

int main(int, char** arguments) {
    void* library = dlopen(arguments[1], RTLD_NOW);
    if (!library) {
        fprintf(stderr, "%s\n", dlerror());
        return 1;
    }
    ((void (*)(decltype(parallel_for)*, decltype(get_num_threads)*))dlsym(library, "vlattn_set_threads"))(
        parallel_for, get_num_threads);
    for (;;) {
        Request request;
        read(&request, sizeof request);
        threads = request.threads;
        std::vector<Pointer> pointers(request.pointers);
        read(pointers.data(), pointers.size() * sizeof(Pointer));
        std::vector<Memory> memories(request.memories);
        for (Memory& memory : memories) read(&memory, 2 * sizeof(int64_t));
        std::string name(request.name, ' '), call(request.call, ' ');
        read(&name[0], name.size());
        read(&call[0], call.size());
        void* function = dlsym(library, name.c_str());
        if (call.empty()) {
            char text[1 << 14] = "";
            if (function) ((void (*)(char*, int64_t))function)(text, sizeof text);
            write(text, sizeof text);
        } else {
            for (Memory& memory : memories) {  // each at the same distance from a line of the cache
                const int64_t before = memory.address % 64;
                memory.here = (char*)aligned_alloc(64, (before + memory.size + 63) / 64 * 64) + before;
                read(memory.here, memory.size);
            }
            for (const Pointer& p : pointers) *(char**)&call[p.at] = memories[p.memory].here + p.offset;
            const int64_t result = ((int64_t (*)(const char*))function)(call.data());
            write(&result, sizeof result);
            for (const Memory& memory : memories) {
                write(memory.here, memory.size);
                free(memory.here - memory.address % 64);
            }
        }
        fflush(stdout);
    }
}
