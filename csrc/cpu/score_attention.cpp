#include "attention.h"
namespace ISA {
struct Try { Size a; };
static Size attention_try(const Try& t) { return t.a; }
}
OPERATOR(attention_try, Try)
