"""The routed experts' SwiGLU, one module for each precision, and the arithmetic that they share."""
