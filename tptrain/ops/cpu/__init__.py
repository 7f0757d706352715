"""Operations in C for CPUs with AVX-512."""
