"""From kernels to machine code: builder of LLVM IR, just-in-time compiler, disk cache."""
