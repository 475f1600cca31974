"""How far each comparison may be off: about ten times the largest error measured, per dtype."""

# Largest |implementation - float64 oracle| over the arg specs, inputs standard normal.
ATTENTION_TOLERANCE = {"float32": 1e-5, "bfloat16": 0.05, "float16": 0.01}
