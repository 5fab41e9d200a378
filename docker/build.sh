#!/usr/bin/env bash
# Builds the images, all or those named, and tries each: what it needs is in it, and it is ours.
#   docker/build.sh [cpu] [cuda]
set -euo pipefail
cd "$(dirname "$0")/.."

docker=${DOCKER:-docker}
if ! command -v "$docker" >/dev/null || ! "$docker" info >/dev/null 2>&1; then
  echo "$docker is not here, or no daemon answers: nothing is built; 'make check' reads the Dockerfile" >&2
  exit 1
fi

# What a container of the image must be able to do.
declare -A try=(
  [cpu]='lorastack --version
    python -c "import torch; assert torch.version.cuda is None"'
  [cuda]='lorastack --version
    python -c "import torch, triton; assert torch.version.cuda"
    echo "#include <Python.h>" > /tmp/launcher.c
    gcc -I"$(python -c "import sysconfig; print(sysconfig.get_path(\"include\"))")" -c /tmp/launcher.c -o /tmp/launcher.o'
)
[ $# -gt 0 ] || set -- cpu cuda
for name; do
  [ -n "${try[$name]-}" ] || { echo "there is no image $name: write cpu or cuda" >&2; exit 2; }
done
for name; do
  echo "== lorastack:$name"
  "$docker" build --target "$name" -t "lorastack:$name" .
  "$docker" run --rm --entrypoint sh "lorastack:$name" -ec "${try[$name]}"
done
