"""The native step: C++ sources, how they are built, and the library they make."""
