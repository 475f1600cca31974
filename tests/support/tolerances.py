"""How far each comparison may be off: about ten times the largest error measured, per dtype."""

# Largest |implementation - float64 oracle| over the arg specs with standard normal inputs, measured on a CPU:
# 1.3e-6, 7.7e-3 and 9.1e-4. A mask that is off by one errs by 0.46 or more.
ATTENTION_TOLERANCE = {"float32": 1.2e-5, "bfloat16": 0.08, "float16": 0.01}

# An 8-bit cache: as far from the numbers as it stores them (measured: 5.8e-7 and 1.0e-2), and so far from the
# numbers as they came, twice the largest measured, 0.018 and 0.14.
EIGHT_BIT_TOLERANCE = {"int8": 0.04, "float8_e4m3fn": 0.28}
