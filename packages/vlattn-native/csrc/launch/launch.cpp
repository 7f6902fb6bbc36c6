// Launches of Triton's kernels that were compiled ahead (vlattn_native/archive.py), in place of Triton's own launcher.
//
// A Launcher stands for a kernel and is called as Triton's JITFunction.run is: with the grid and named arguments, members of tuples
// among them. One walk over them makes the key of the launch (constants and options, types, whether a number is 1 or a multiple of
// 16) and collects the numbers and addresses. A key that is new goes to Python, `resolve`, which finds the compiled kernel or
// nothing; then, and for what no key describes, such as tensor descriptors, Triton launches. The GIL guards all maps.
#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#include <list>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "driver.h"

namespace {

Driver driver;

// What `connect` says of torch
PyObject *tensor_type, *current_device, *current_stream, *text_of;
PyObject *word_data_ptr, *word_dtype, *word_grid, *word_warmup, *word_shape, *word_stride;
// The launches of this thread since `record`, or nullptr; None among them: one that Triton launched
thread_local PyObject* recorded = nullptr;

// A constant that is no number and no string, by its address: what it says in a text, numbered. It is kept alive.
uint32_t number_of(PyObject* constant, bool& failed) {
    static std::unordered_map<PyObject*, uint32_t> by_address;
    static std::unordered_map<std::string, uint32_t> by_text;
    const auto known = by_address.find(constant);
    if (known != by_address.end()) return known->second;
    PyObject* text = PyObject_CallFunctionObjArgs(text_of, constant, nullptr);
    Py_ssize_t size = 0;
    const char* characters = text ? PyUnicode_AsUTF8AndSize(text, &size) : nullptr;
    if (!characters) return Py_XDECREF(text), failed = true, 0;
    const uint32_t number = by_text.try_emplace(std::string(characters, size), (uint32_t)by_text.size()).first->second;
    Py_DECREF(text);
    if (by_address.size() >= 65536) {  // a program that makes its constants anew
        for (const auto& one : by_address) Py_DECREF(one.first);
        by_address.clear();
    }
    Py_INCREF(constant);
    by_address[constant] = number;
    return number;
}

union Value {
    int64_t integer;
    double number;
};

// The arguments of a launch: key and values. `covered`: whether the key describes them; an error of Python's is set if `failed`.
struct Arguments {
    std::string key;
    std::vector<Value> leaves;
    std::string kinds;  // of the leaves: p is a tensor
    std::vector<bool> is_tensor;  // of arguments of which this is `metadata`
    bool covered = true, failed = false;

    void clear() { key.clear(), leaves.clear(), kinds.clear(), covered = true, failed = false; }
    template <class Number> void put(Number number) { key.append((const char*)&number, sizeof number); }
    void leaf(char code, int64_t integer = 0) {
        key.push_back(code);
        Value value;
        value.integer = integer;
        leaves.push_back(value), kinds.push_back(code == 'P' ? 'p' : code);
    }

    void constant(PyObject* x) {
        leaf('C');
        if (x == Py_None) return key.push_back('N');
        if (PyBool_Check(x)) return key.push_back(x == Py_True ? 'T' : 'F');
        Py_ssize_t size = 0;
        if (PyLong_CheckExact(x)) {
            key.push_back('i'), put(integer(x));
        } else if (PyUnicode_Check(x)) {
            const char* text = PyUnicode_AsUTF8AndSize(x, &size);
            if (!text) return (void)(failed = true);
            key.push_back('s'), put(size), key.append(text, size);
        } else {
            key.push_back('o'), put(number_of(x, failed));
        }
    }

    // All that a plan may read of an argument: values of numbers, metadata of tensors, whose addresses become leaves
    void metadata(PyObject* x) {
        if (failed || !covered) return;
        is_tensor.push_back(false);
        if (PyFloat_Check(x)) return key.push_back('f'), put(PyFloat_AsDouble(x));
        if (!PyType_IsSubtype(Py_TYPE(x), (PyTypeObject*)tensor_type))
            return PyTuple_Check(x) || PyList_Check(x) ? (void)(covered = false) : constant(x);
        is_tensor.back() = true;
        tensor(x);
        PyObject *shape = PyObject_GetAttr(x, word_shape), *stride = PyObject_CallMethodObjArgs(x, word_stride, nullptr);
        failed = failed || !shape || !stride;
        for (PyObject* sizes : {shape, stride})
            for (Py_ssize_t n = 0; !failed && n < PyTuple_Size(sizes); ++n) put(integer(PyTuple_GetItem(sizes, n)));
        key.push_back(';');
        Py_XDECREF(shape), Py_XDECREF(stride);
    }

    void argument(PyObject* x) {
        if (failed || !covered) return;
        if (x == Py_None) return leaf('N');
        if (PyBool_Check(x)) return leaf('b', x == Py_True);
        if (PyLong_Check(x)) {
            const int64_t number = integer(x);
            leaf(number == 1 ? '1' : number % 16 == 0 ? 'D' : 'i', number);
            key.push_back(number < INT32_MIN || number > INT32_MAX ? 'w' : 'n');
        } else if (PyFloat_Check(x)) {
            leaf('f');
            leaves.back().number = PyFloat_AsDouble(x);
        } else if (PyTuple_Check(x)) {
            key.push_back('(');
            const Py_ssize_t members = PyTuple_Size(x);
            for (Py_ssize_t n = 0; n < members; ++n) argument(PyTuple_GetItem(x, n));
            key.push_back(')');
        } else if (PyType_IsSubtype(Py_TYPE(x), (PyTypeObject*)tensor_type)) {
            tensor(x);
        } else {
            covered = false;
        }
    }

   private:
    int64_t integer(PyObject* x) {
        int overflow = 0;
        const int64_t number = PyLong_AsLongLongAndOverflow(x, &overflow);
        covered = covered && !overflow;
        return number;
    }
    void tensor(PyObject* x) {
        PyObject *dtype = PyObject_GetAttr(x, word_dtype), *address = PyObject_CallMethodObjArgs(x, word_data_ptr, nullptr);
        if (dtype && address) {
            const uint64_t number = PyLong_AsUnsignedLongLong(address);
            failed = failed || (number == (uint64_t)-1 && PyErr_Occurred());
            leaf(number % 16 == 0 ? 'P' : 'p', (int64_t)number);
            put(dtype);  // there is one object for each dtype, which lives as long as torch
        } else {
            failed = true;
        }
        Py_XDECREF(dtype), Py_XDECREF(address);
    }
};

// A parameter of the compiled kernel: a leaf of the arguments, and its type. A leaf of -1 is scratch memory that it does not use.
struct Parameter {
    int leaf;
    char code;  // p: address; q, i, h, b: integers of 8, 4, 2 and 1 bytes; d, f: floats of 8 and 4
};
struct Compiled {
    void* function = nullptr;  // nullptr: Triton launches
    unsigned threads = 0, shared = 0;
    std::vector<Parameter> parameters;
    std::string name;
};

struct Kernel {
    std::vector<PyObject*> names;  // of the parameters, in their order
    std::vector<bool> constants;
    PyObject *resolve, *otherwise;
    std::unordered_map<std::string, Compiled> known;
};

struct Launcher {
    PyObject ob_base;
    Kernel* kernel;
};

bool unsigned_of(PyObject* x, unsigned& number) {
    int overflow = 0;
    const long long value = PyLong_AsLongLongAndOverflow(x, &overflow);
    number = (unsigned)value;
    if (value == -1 && PyErr_Occurred()) return false;
    if (!overflow && value == (long long)number) return true;
    PyErr_Format(PyExc_ValueError, "an axis of a grid has from 0 to 4294967295 programs; got %R", x);
    return false;
}

// What `resolve` gives: None, or (function, name, threads, bytes of shared memory, ((leaf, code), ...))
bool read(PyObject* found, Compiled& compiled) {
    if (found == Py_None) return true;
    unsigned long long function = 0;
    const char* name = nullptr;
    PyObject* parameters = nullptr;
    if (!PyArg_ParseTuple(found, "KsIIO!", &function, &name, &compiled.threads, &compiled.shared, &PyTuple_Type, &parameters))
        return false;
    for (Py_ssize_t n = 0; n < PyTuple_Size(parameters); ++n) {
        Parameter one = {0, 0};
        const char* code = nullptr;
        if (!PyArg_ParseTuple(PyTuple_GetItem(parameters, n), "is", &one.leaf, &code)) return false;
        one.code = code[0];
        compiled.parameters.push_back(one);
    }
    compiled.function = (void*)function, compiled.name = name;
    return true;
}

// The parameters of the compiled kernel, each in the first bytes of a value
std::vector<Value> values_of(const Compiled& compiled, const std::vector<Value>& leaves) {
    std::vector<Value> values(compiled.parameters.size());
    for (size_t n = 0; n < values.size(); ++n) {
        const Parameter& one = compiled.parameters[n];
        values[n].integer = 0;
        if (one.leaf < 0) continue;
        const Value& leaf = leaves[one.leaf];
        const float single = (float)leaf.number;
        if (one.code == 'f') memcpy(&values[n], &single, sizeof single);
        else values[n] = leaf;  // little-endian: the first bytes of an integer are the narrower one
    }
    return values;
}

bool start(const Compiled& compiled, std::vector<Value>& values, const unsigned* grid, int device, PyObject* stream) {
    std::vector<void*> addresses(values.size());
    for (size_t n = 0; n < values.size(); ++n) addresses[n] = &values[n];
    const unsigned long long at = PyLong_AsUnsignedLongLong(stream);
    if (at == (unsigned long long)-1 && PyErr_Occurred()) return false;
    Driver::Result result = 0;
    Py_BEGIN_ALLOW_THREADS;
    result = driver.within(device, [&] {
        return driver.cuLaunchKernel(compiled.function, grid[0], grid[1], grid[2], compiled.threads, 1, 1, compiled.shared,
                                     (void*)at, addresses.data(), nullptr);
    });
    Py_END_ALLOW_THREADS;
    if (result == 0) return true;
    PyErr_Format(
        PyExc_RuntimeError, "%s was not launched on a grid of (%u, %u, %u) with %u threads and %u bytes of shared memory: %s",
        compiled.name.c_str(), grid[0], grid[1], grid[2], compiled.threads, compiled.shared, driver.error(result).c_str());
    return false;
}

// Triton launches.
PyObject* otherwise(const Kernel& kernel, PyObject* args, PyObject* named) {
    if (recorded && PyList_Append(recorded, Py_None) < 0) return nullptr;
    return PyObject_Call(kernel.otherwise, args, named);
}

// For `record`: the compiled kernel, the grid, all values, and which of them are addresses of tensors
bool remember(const Compiled& compiled, const std::vector<Value>& values, const unsigned* grid, const std::string& kinds) {
    PyObject *all = PyList_New(0), *tensors = PyList_New(0);
    bool is_done = all && tensors;
    for (size_t n = 0; is_done && n < values.size(); ++n) {
        PyObject* value = PyLong_FromLongLong(values[n].integer);
        is_done = value && PyList_Append(all, value) == 0;
        Py_XDECREF(value);
        const int leaf = compiled.parameters[n].leaf;
        PyObject* number = PyLong_FromSize_t(n);
        if (leaf >= 0 && kinds[leaf] == 'p') is_done = is_done && number && PyList_Append(tensors, number) == 0;
        Py_XDECREF(number);
    }
    PyObject* launch =
        is_done ? Py_BuildValue("K(III)OO", (unsigned long long)&compiled, grid[0], grid[1], grid[2], all, tensors) : nullptr;
    is_done = launch && PyList_Append(recorded, launch) == 0;
    Py_XDECREF(launch), Py_XDECREF(all), Py_XDECREF(tensors);
    return is_done;
}

PyObject* call(PyObject* self, PyObject* args, PyObject* named) {
    Kernel& kernel = *((Launcher*)self)->kernel;
    PyObject* grid_of = named ? PyDict_GetItemWithError(named, word_grid) : nullptr;
    PyObject* warmup = named ? PyDict_GetItemWithError(named, word_warmup) : nullptr;
    if (!grid_of || !PyTuple_Check(grid_of) || warmup != Py_False || PyTuple_Size(args) > 0)
        return PyErr_Occurred() ? nullptr : otherwise(kernel, args, named);

    static thread_local Arguments arguments;
    arguments.clear();
    Py_ssize_t others = PyDict_Size(named) - 2;
    for (size_t n = 0; n < kernel.names.size(); ++n) {
        PyObject* x = PyDict_GetItemWithError(named, kernel.names[n]);
        if (!x && PyErr_Occurred()) return nullptr;
        if (!x) arguments.leaf('-');  // its default
        else if (--others, kernel.constants[n]) arguments.constant(x);
        else arguments.argument(x);
    }
    if (others > 0) {  // options, as the number of warps
        PyObject *name = nullptr, *x = nullptr;
        for (Py_ssize_t place = 0; PyDict_Next(named, &place, &name, &x);) {
            bool is_parameter = PyUnicode_Compare(name, word_grid) == 0 || PyUnicode_Compare(name, word_warmup) == 0;
            for (size_t n = 0; n < kernel.names.size() && !is_parameter; ++n)
                is_parameter = PyUnicode_Compare(name, kernel.names[n]) == 0;
            if (!is_parameter) arguments.constant(name), arguments.constant(x);
        }
    }
    unsigned grid[3] = {1, 1, 1};
    const Py_ssize_t axes = PyTuple_Size(grid_of);
    for (Py_ssize_t n = 0; n < axes && n < 3; ++n)
        if (!unsigned_of(PyTuple_GetItem(grid_of, n), grid[n])) return nullptr;
    if (arguments.failed) return nullptr;
    if (!arguments.covered) return otherwise(kernel, args, named);

    PyObject* device_number = PyObject_CallNoArgs(current_device);
    unsigned device = 0;
    if (!device_number || !unsigned_of(device_number, device)) return Py_XDECREF(device_number), nullptr;
    arguments.put(device);
    auto entry = kernel.known.find(arguments.key);  // not used once another thread may have the GIL
    const Compiled* compiled = entry == kernel.known.end() ? nullptr : &entry->second;
    if (!compiled) {
        const std::string key = arguments.key;  // resolving may launch
        const std::vector<Value> leaves = arguments.leaves;
        const std::string kinds = arguments.kinds;
        PyObject* found = PyObject_CallFunctionObjArgs(kernel.resolve, named, device_number, nullptr);
        Compiled resolved;
        const bool is_read = found && read(found, resolved);
        Py_XDECREF(found);
        if (!is_read) return Py_DECREF(device_number), nullptr;
        for (const Parameter& one : resolved.parameters)
            if (one.leaf >= (int)leaves.size()) {
                Py_DECREF(device_number);
                PyErr_SetString(
                    PyExc_RuntimeError, "the archive of compiled kernels does not fit the launcher: install vlattn-native again");
                return nullptr;
            }
        compiled = &kernel.known.try_emplace(key, resolved).first->second;
        arguments.leaves = leaves, arguments.kinds = kinds;
    }
    if (!compiled->function) return Py_DECREF(device_number), otherwise(kernel, args, named);
    if (grid[0] == 0 || grid[1] == 0 || grid[2] == 0) return Py_DECREF(device_number), Py_NewRef(Py_None);
    std::vector<Value> values = values_of(*compiled, arguments.leaves);
    const std::string kinds = recorded ? arguments.kinds : "";
    PyObject* stream = PyObject_CallFunctionObjArgs(current_stream, device_number, nullptr);  // it may launch
    Py_DECREF(device_number);
    bool is_started = stream && start(*compiled, values, grid, (int)device, stream);
    Py_XDECREF(stream);
    if (is_started && recorded) is_started = remember(*compiled, values, grid, kinds);
    return is_started ? Py_NewRef(Py_None) : nullptr;
}

// Launcher(((name, is a constant), ...), resolve, otherwise)
PyObject* make(PyTypeObject* type, PyObject* args, PyObject*) {
    PyObject *parameters = nullptr, *resolve = nullptr, *otherwise = nullptr;
    if (!PyArg_ParseTuple(args, "O!OO", &PyTuple_Type, &parameters, &resolve, &otherwise)) return nullptr;
    auto* kernel = new Kernel;
    kernel->resolve = Py_NewRef(resolve), kernel->otherwise = Py_NewRef(otherwise);
    for (Py_ssize_t n = 0; n < PyTuple_Size(parameters); ++n) {
        PyObject* name = nullptr;
        int is_constant = 0;
        if (!PyArg_ParseTuple(PyTuple_GetItem(parameters, n), "Up", &name, &is_constant)) return nullptr;
        Py_INCREF(name);
        PyUnicode_InternInPlace(&name);  // as names of keywords are
        kernel->names.push_back(name), kernel->constants.push_back(is_constant);
    }
    PyObject* self = ((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (self) ((Launcher*)self)->kernel = kernel;  // lives as long as its kernel, that is to the end of the process
    return self;
}

// ---- the launches of a planned call, again

struct Source {
    int tensor;  // an argument of the call, and after these a tensor that it allocates
    int64_t offset;  // bytes
};
struct Again {
    const Compiled* compiled;
    unsigned grid[3];
    std::vector<Value> values;
    std::vector<std::pair<int, Source>> tensors;  // by the number of the value
};
struct Plan {
    bool repeats = false;
    std::vector<PyObject*> allocations;  // the arguments of `allocate`
    std::vector<Again> launches;
    std::vector<int> outputs;  // numbers of allocations, or -1 for None
    bool is_single = false;

    Plan() = default;
    Plan(const Plan&) = delete;
    ~Plan() {
        for (PyObject* one : allocations) Py_DECREF(one);
    }
};
// The plans of the calls that were made last, by what describes a call. One that a thread repeats lives until it is done.
class Plans {
   public:
    std::shared_ptr<const Plan> find(const std::string& key) {
        const auto found = by_key.find(key);
        if (found == by_key.end()) return nullptr;
        newest_first.splice(newest_first.begin(), newest_first, found->second);
        return found->second->second;
    }
    void add(const std::string& key, std::shared_ptr<const Plan> plan) {
        if (by_key.count(key)) return;  // another thread was first
        newest_first.emplace_front(key, std::move(plan));
        by_key[newest_first.front().first] = newest_first.begin();
        if (newest_first.size() <= MOST) return;
        by_key.erase(newest_first.back().first);
        newest_first.pop_back();
    }

   private:
    using Order = std::list<std::pair<const std::string, std::shared_ptr<const Plan>>>;
    static constexpr size_t MOST = 4096;
    Order newest_first;
    std::unordered_map<std::string_view, Order::iterator> by_key;
};
struct Planned {
    PyObject ob_base;
    PyObject *function, *plan, *state, *allocate;
    Plans* known;
};

// What `plan` gives beside the result: None, or (allocations, launches, outputs, whether the output is no tuple)
bool read(PyObject* made, Plan& plan) {
    if (made == Py_None) return true;
    PyObject *allocations, *launches, *outputs;
    int is_single = 0;
    if (!PyArg_ParseTuple(
            made, "O!O!O!p", &PyTuple_Type, &allocations, &PyTuple_Type, &launches, &PyTuple_Type, &outputs, &is_single))
        return false;
    for (Py_ssize_t n = 0; n < PyTuple_Size(launches); ++n) {
        PyObject *values, *tensors;
        unsigned long long compiled = 0;
        Again again;
        if (!PyArg_ParseTuple(PyTuple_GetItem(launches, n), "K(III)O!O!", &compiled, &again.grid[0], &again.grid[1],
                              &again.grid[2], &PyList_Type, &values, &PyList_Type, &tensors))
            return false;
        again.compiled = (const Compiled*)compiled;
        for (Py_ssize_t m = 0; m < PyList_Size(values); ++m) {
            Value value;
            value.integer = PyLong_AsLongLong(PyList_GetItem(values, m));
            again.values.push_back(value);
        }
        for (Py_ssize_t m = 0; m < PyList_Size(tensors); ++m) {
            int number = 0;
            Source source = {0, 0};
            if (!PyArg_ParseTuple(PyList_GetItem(tensors, m), "iiL", &number, &source.tensor, &source.offset)) return false;
            again.tensors.push_back({number, source});
        }
        plan.launches.push_back(again);
    }
    for (Py_ssize_t n = 0; n < PyTuple_Size(outputs); ++n)
        plan.outputs.push_back((int)PyLong_AsLong(PyTuple_GetItem(outputs, n)));
    if (PyErr_Occurred()) return false;
    for (Py_ssize_t n = 0; n < PyTuple_Size(allocations); ++n)
        plan.allocations.push_back(Py_NewRef(PyTuple_GetItem(allocations, n)));
    plan.is_single = is_single, plan.repeats = true;
    return true;
}

PyObject* repeat(const Planned& self, const Plan& plan, std::vector<Value> addresses, PyObject* device_number, unsigned device) {
    std::vector<PyObject*> made;
    bool is_done = true;
    for (PyObject* arguments : plan.allocations) {
        PyObject* tensor = PyObject_CallObject(self.allocate, arguments);
        PyObject* address = tensor ? PyObject_CallMethodObjArgs(tensor, word_data_ptr, nullptr) : nullptr;
        if (tensor) made.push_back(tensor);
        if (!(is_done = address)) break;
        Value value;
        value.integer = (int64_t)PyLong_AsUnsignedLongLong(address);
        addresses.push_back(value);
        Py_DECREF(address);
    }
    PyObject* stream = is_done ? PyObject_CallFunctionObjArgs(current_stream, device_number, nullptr) : nullptr;
    is_done = is_done && stream;
    for (size_t n = 0; is_done && n < plan.launches.size(); ++n) {
        const Again& again = plan.launches[n];
        std::vector<Value> values = again.values;
        for (const auto& one : again.tensors)
            values[one.first].integer = addresses[one.second.tensor].integer + one.second.offset;
        is_done = start(*again.compiled, values, again.grid, (int)device, stream);
    }
    Py_XDECREF(stream);
    PyObject* result = nullptr;
    if (is_done && plan.is_single) {
        result = Py_NewRef(made[plan.outputs[0]]);
    } else if (is_done && (result = PyTuple_New((Py_ssize_t)plan.outputs.size()))) {
        for (size_t n = 0; n < plan.outputs.size(); ++n)
            PyTuple_SetItem(result, (Py_ssize_t)n, Py_NewRef(plan.outputs[n] < 0 ? Py_None : made[plan.outputs[n]]));
    }
    for (PyObject* one : made) Py_DECREF(one);
    return result;
}

PyObject* call_planned(PyObject* object, PyObject* args, PyObject*) {
    const Planned& self = *(Planned*)object;
    PyObject *inputs = nullptr, *state = nullptr;
    if (!PyArg_ParseTuple(args, "O!", &PyTuple_Type, &inputs)) return nullptr;
    if (recorded) return PyObject_CallFunctionObjArgs(self.function, inputs, nullptr);  // a part of another call
    Arguments arguments;
    size_t count = 0;
    const auto add = [&](PyObject* x) {
        arguments.metadata(x);
        arguments.leaves.resize(++count);  // an address for each argument
    };
    for (Py_ssize_t n = 0; n < PyTuple_Size(inputs); ++n) {
        PyObject* x = PyTuple_GetItem(inputs, n);
        if (!PyTuple_Check(x)) add(x);
        for (Py_ssize_t m = 0; PyTuple_Check(x) && m < PyTuple_Size(x); ++m) add(PyTuple_GetItem(x, m));  // of an attention
    }
    if (!(state = PyObject_CallNoArgs(self.state))) return nullptr;
    if (state == Py_None) arguments.covered = false;
    arguments.constant(state);
    Py_DECREF(state);
    arguments.leaves.resize(count);
    if (arguments.failed) return nullptr;
    for (size_t n = 0; n < count; ++n)  // which tensor an address belongs to must be certain
        for (size_t m = 0; arguments.is_tensor[n] && m <= n; ++m)
            if (arguments.is_tensor[m] && arguments.leaves[n].integer == (m == n ? 0 : arguments.leaves[m].integer))
                arguments.covered = false;
    if (!arguments.covered) return PyObject_CallFunctionObjArgs(self.function, inputs, nullptr);
    unsigned device = 0;
    PyObject* device_number = PyObject_CallNoArgs(current_device);
    if (!device_number || !unsigned_of(device_number, device)) return Py_XDECREF(device_number), nullptr;
    arguments.put(device);
    if (const auto known = self.known->find(arguments.key)) {
        PyObject* result = known->repeats ? repeat(self, *known, arguments.leaves, device_number, device)
                                          : PyObject_CallFunctionObjArgs(self.function, inputs, nullptr);
        return Py_DECREF(device_number), result;
    }
    Py_DECREF(device_number);
    PyObject *planned = PyObject_CallFunctionObjArgs(self.plan, self.function, inputs, nullptr), *result = nullptr,
             *made = nullptr;
    const auto plan = std::make_shared<Plan>();
    if (planned && PyArg_ParseTuple(planned, "OO", &result, &made) && read(made, *plan)) {
        self.known->add(arguments.key, plan);
        Py_INCREF(result);
    } else {
        result = nullptr;
    }
    Py_XDECREF(planned);
    return result;
}

// Planned(function, plan, state, allocate): `function` of a tuple of arguments, and what it launches again when it is called with
// the same metadata. plan(function, inputs) runs it for the first time, and gives the result and what to repeat. state() is a
// number for what the function depends on beside its arguments, or None where it must run.
PyObject* make_planned(PyTypeObject* type, PyObject* args, PyObject*) {
    PyObject* parts[4];
    if (!PyArg_ParseTuple(args, "OOOO", &parts[0], &parts[1], &parts[2], &parts[3])) return nullptr;
    auto* self = (Planned*)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (!self) return nullptr;
    self->function = Py_NewRef(parts[0]), self->plan = Py_NewRef(parts[1]);
    self->state = Py_NewRef(parts[2]), self->allocate = Py_NewRef(parts[3]);
    self->known = new Plans;
    return (PyObject*)self;
}

PyObject* record(PyObject*, PyObject*) {
    Py_XDECREF(recorded);
    return (recorded = PyList_New(0)) ? Py_NewRef(Py_None) : nullptr;
}
PyObject* end_record(PyObject*, PyObject*) {
    PyObject* launches = recorded ? recorded : Py_NewRef(Py_None);
    recorded = nullptr;
    return launches;
}

PyObject* connect(PyObject*, PyObject* args) {
    const char* path = nullptr;
    PyObject* functions[4];
    if (!PyArg_ParseTuple(args, "sOOOO", &path, &functions[0], &functions[1], &functions[2], &functions[3])) return nullptr;
    const std::string error = driver.open(path);
    if (!error.empty()) return PyErr_Format(PyExc_OSError, "CUDA's driver cannot be used: %s", error.c_str());
    PyObject** places[] = {&tensor_type, &current_device, &current_stream, &text_of};
    for (int n = 0; n < 4; ++n) {
        PyObject* before = *places[n];
        *places[n] = Py_NewRef(functions[n]);
        Py_XDECREF(before);
    }
    return Py_NewRef(Py_None);
}

PyObject* load(PyObject*, PyObject* args) {
    const char *image = nullptr, *name = nullptr;
    int shared = 0, device = 0;
    Py_ssize_t size = 0;
    if (!PyArg_ParseTuple(args, "y#sii", &image, &size, &name, &shared, &device)) return nullptr;
    void* function = nullptr;
    const Driver::Result result = driver.within(device, [&] { return driver.load(image, name, shared, &function); });
    if (result == 0) return PyLong_FromUnsignedLongLong((unsigned long long)function);
    return PyErr_Format(PyExc_RuntimeError, "the driver does not load %s: %s", name, driver.error(result).c_str());
}

PyMethodDef functions[] = {
    {"connect", connect, METH_VARARGS,
     "connect(path, tensor, device, stream, text): opens the driver; the class of tensors, functions of the current device, of a "
     "device's stream, and of the text of a constant."},
    {"load", load, METH_VARARGS, "load(image, name, shared, device): the driver's function of a cubin or PTX, as a number."},
    {"record", record, METH_NOARGS, "record(): from here on this thread's launches are remembered."},
    {"end_record", end_record, METH_NOARGS,
     "end_record(): the launches since `record`: (kernel, grid, values, which values are addresses); None for one of Triton."},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "vlattn_launch", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};
PyType_Slot slots[] = {{Py_tp_call, (void*)call}, {Py_tp_new, (void*)make}, {0, nullptr}};
PyType_Slot planned_slots[] = {{Py_tp_call, (void*)call_planned}, {Py_tp_new, (void*)make_planned}, {0, nullptr}};
PyType_Spec planned_spec = {"vlattn_launch.Planned", sizeof(Planned), 0, Py_TPFLAGS_DEFAULT, planned_slots};
PyType_Spec spec = {"vlattn_launch.Launcher", sizeof(Launcher), 0, Py_TPFLAGS_DEFAULT, slots};

}  // namespace

PyMODINIT_FUNC PyInit_vlattn_launch() {
    word_data_ptr = PyUnicode_InternFromString("data_ptr"), word_dtype = PyUnicode_InternFromString("dtype");
    word_shape = PyUnicode_InternFromString("shape"), word_stride = PyUnicode_InternFromString("stride");
    word_grid = PyUnicode_InternFromString("grid"), word_warmup = PyUnicode_InternFromString("warmup");
    PyObject* module = PyModule_Create(&definition);
    if (!module || PyModule_AddObject(module, "Launcher", PyType_FromSpec(&spec)) < 0 ||
        PyModule_AddObject(module, "Planned", PyType_FromSpec(&planned_spec)) < 0)
        return nullptr;
    return module;
}
