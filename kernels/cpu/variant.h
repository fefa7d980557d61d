// All of a variant but its float vectors and its table lookup.
#include "rotate.h"
#include "quantize.h"
#include "low_rank.h"
#include "prepare.h"
#include "multiply.h"
