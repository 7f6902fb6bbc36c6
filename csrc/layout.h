// Where the members of a packed struct lie, by name: Python reads it before it first calls a kernel (Library.struct of
// vlattn_fast/backends/native.py).
#pragma once
#include <stdint.h>
#include <stdio.h>
#include <string.h>

// Stands behind the members of a struct and names them all.
#define FIELDS(...) \
    template <class Visitor> void fields(Visitor& visitor) const { visitor.all(#__VA_ARGS__, __VA_ARGS__); }

namespace {

template <class Type> struct Layout {
    char* text;  // (size) to write to
    int64_t size, end = 0;
    char path[128] = "";
    Type call = {};

    // A line for each number, its name, code (of Python's `struct`) and offset: "a.query.stride_b q 80". The last line has the size.
    void describe() {
        call.fields(*this);
        write("size %d", (int)sizeof(call));
    }
    template <class... Values> void write(const char* format, Values... values) {
        if (end < size) end += snprintf(text + end, size - end, format, values...);
    }
    template <class... Members>
    void all(const char* names, const Members&... members) {  // names: "a, b", in the order of the members
        (named(names, members), ...);
    }
    template <class Member> void named(const char*& names, const Member& member) {
        const size_t before = strlen(path), length = strcspn(names, ",");
        snprintf(path + before, sizeof(path) - before, "%s%.*s", before > 0 ? "." : "", (int)length, names);
        add(member, 0);
        path[before] = 0;
        names += length + strspn(names + length, ", ");
    }
    template <class Member, size_t COUNT> void add(const Member (&members)[COUNT], int) {
        const size_t before = strlen(path);
        for (size_t n = 0; n < COUNT; ++n) {
            snprintf(path + before, sizeof(path) - before, "[%d]", (int)n);
            add(members[n], 0);
        }
        path[before] = 0;
    }
    template <class Struct> auto add(const Struct& inner, int) -> decltype(inner.fields(*this)) { inner.fields(*this); }
    template <class Number> void add(const Number& number, long) {
        const int offset = (int)((const char*)&number - (const char*)&call);
        write("%s %c %d\n", path, code(&number), offset);
    }
    static char code(const float*) { return 'f'; }
    static char code(const double*) { return 'd'; }
    static char code(const bool*) { return '?'; }
    template <class Pointed> static char code(Pointed* const*) { return 'P'; }
    template <class Number> static char code(const Number*) { return sizeof(Number) == 8 ? 'q' : 'i'; }
};

}  // namespace
