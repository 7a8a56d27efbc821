"""Generate the LLVM IR of the C sources of the engine: ``python -m tests.engine.runtime.generate_thread_pool``.

It needs clang 16 (``apt-get install clang-16``). The IR that a newer clang prints may have attributes that the LLVM of
an older llvmlite does not know; the IR of clang 16 loads in LLVM 20 to 22, which llvmlite 0.45 and later ship.
"""

import re
import shutil
import subprocess
from pathlib import Path

import repvgg.engine.runtime

FOLDER = Path(repvgg.engine.runtime.__path__[0])
SOURCE = FOLDER / "thread_pool.c"
CLANG = "clang-16"
#: Flags of clang for each of the files.
FLAGS = {
    "thread_pool.linux_x86_64.ll": ["--target=x86_64-linux-gnu"],
    "thread_pool.linux_aarch64.ll": ["--target=aarch64-linux-gnu"],
    # For all other platforms: what is left of the target is removed below.
    "thread_pool.single_threaded.ll": ["--target=x86_64-linux-gnu", "-DSINGLE_THREADED"],
    "library.linux_x86_64.ll": ["--target=x86_64-linux-gnu"],
    "library.linux_aarch64.ll": ["--target=aarch64-linux-gnu"],
}
# -fPIC: the C library may be further away than a 32-bit jump reaches. -O1: readable IR; llvmlite optimizes it again.
_ALL = ["-std=c11", "-ffreestanding", "-fPIC", "-O1", "-fno-discard-value-names", "-Wall", "-Wextra", "-Werror"]
_HEAD = "; Generated from {source} by `make thread-pool-ir` with clang 16: do not edit.\n\n"


def available() -> bool:
    return shutil.which(CLANG) is not None


def generate(name: str) -> str:
    """The text of one of the files."""
    source = FOLDER / f"{name.partition('.')[0]}.c"
    command = [CLANG, *FLAGS[name], *_ALL, "-S", "-emit-llvm", "-o", "-", str(source)]
    return _HEAD.format(source=source.name) + strip(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout
    )


def strip(ir: str) -> str:
    """Remove what binds IR to a version of LLVM or to a processor; the JIT sets the target itself."""
    ir = re.sub(r"^(; ModuleID|source_filename|target |attributes |!|; Function Attrs).*\n", "", ir, flags=re.M)
    ir = re.sub(r" #\d+ \{$", " nounwind {", ir, flags=re.M)  # no unwind tables, as kernels have none
    ir = re.sub(r" #\d+\b", "", ir)
    ir = re.sub(r"^.*@llvm\.lifetime\..*\n", "", ir, flags=re.M)  # LLVM 22 changed their parameters
    ir = re.sub(r", ![\w.]+ !\d+", "", ir)  # !tbaa, !llvm.loop
    ir = re.sub(r" +; preds = .*", "", ir)
    ir = re.sub(r"\b(noundef|nonnull|nocapture|readonly|readnone|writeonly) ", "", ir)
    ir = re.sub(r" (local_)?unnamed_addr\b", "", ir)
    return re.sub(r"\n{3,}", "\n\n", ir).strip() + "\n"


if __name__ == "__main__":
    for name in FLAGS:
        (FOLDER / name).write_text(generate(name))
        print(FOLDER / name)
