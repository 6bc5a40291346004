#!/usr/bin/env bash
# Mutation tests of the modules named in pyproject.toml's [tool.mutmut]; docs/mutation.md has the
# figures. In an environment with the dev extra and `pip install mutmut==3.8.1`:
#
#   tests/mutation.sh                     all 2,500 mutants: many hours of a core
#   tests/mutation.sh data/split          those of a module
#   tests/mutation.sh row_adam 120        a random sample of them, always the same one
#
# What is in mutants/ is gone on with; `mutmut results` and `mutmut show NAME` tell of it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Nearly all of the time is compilation, of the same programs but for the mutant's.
export JAX_PLATFORMS=cpu JAX_DISABLE_MOST_OPTIMIZATIONS=1
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/mutants/.compiled}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1

names=()
if [[ -n "${1:-}" ]]; then
  mapfile -t names < <(python - "$1" "${2:-}" <<'PYTHON'
import random, sys
from mutmut.mutation.file_mutation import mutate_file_contents

path = f"conet_jax/{sys.argv[1]}.py"
names = sorted(mutate_file_contents(path, open(path).read(), None, None).mutant_names)
count = int(sys.argv[2] or len(names))
for name in random.Random(0).sample(names, min(count, len(names))):
    print("conet_jax." + sys.argv[1].replace("/", ".") + "." + name)
PYTHON
  )
fi
mutmut run --max-children "${JOBS:-1}" "${names[@]}"
