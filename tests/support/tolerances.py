"""How far each comparison may be off: about ten times the largest error measured, per dtype."""

# Largest |implementation - float64 oracle| over the arg specs with standard normal inputs, measured on a CPU:
# 1.3e-6, 7.7e-3 and 9.1e-4. A mask that is off by one errs by 0.46 or more.
ATTENTION_TOLERANCE = {"float32": 1.2e-5, "bfloat16": 0.08, "float16": 0.01}

# From the numbers as an 8-bit cache stores them, the same (measured: 5.8e-7 and 1.0e-2). From the numbers before
# they were rounded to it, what that rounding costs: twice the largest measured, 0.018 and 0.14.
EIGHT_BIT_TOLERANCE = {"int8": 0.04, "float8_e4m3fn": 0.28}
