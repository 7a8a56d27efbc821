"""What compiled code runs on: the thread pool (C code and its LLVM IR), memory and its layouts."""
