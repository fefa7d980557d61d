// All of a variant but its float vectors, its table lookup and its head_dots.
#include "rotate.h"
#include "quantize.h"
#include "low_rank.h"
#include "prepare.h"
#include "multiply.h"
#include "head.h"
#include "sign_steps.h"
#include "level_steps.h"
