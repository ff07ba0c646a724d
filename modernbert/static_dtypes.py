"""What the numbers of a static table may be; apart, so that `--help` waits for no import."""

DTYPES = ("float16", "float32", "float64", "int8")
