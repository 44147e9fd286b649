#!/bin/sh
# Installs reelforge on a machine with or without an NVIDIA GPU: compiler, runtime and service, from this checkout.
#
#   sh deploy/install.sh            into ~/.local/share/reelforge, with its commands linked in ~/.local/bin
#   PREFIX=/opt/reelforge BIN=/usr/local/bin sh deploy/install.sh
#
# The GPU decides which of NVIDIA's compilers comes with it; BACKEND=cpu, cuda, rtx or tensorrt overrules that.
set -eu

source=$(cd "$(dirname "$0")/.." && pwd)
prefix=${PREFIX:-$HOME/.local/share/reelforge}
bin=${BIN:-$HOME/.local/bin}
python=${PYTHON:-python3}

if [ -z "${BACKEND:-}" ]; then
  BACKEND=cpu
  if command -v nvidia-smi >/dev/null 2>&1; then
    # Compute capability of the first GPU. TensorRT-RTX has no data-centre Hopper or Blackwell.
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)
    case $capability in
      9.0 | 10.0) BACKEND=tensorrt ;;
      7.5 | 8.0 | 8.6 | 8.9 | 12.0 | 12.1) BACKEND=rtx ;;
      *) echo "the GPU's compute capability '$capability' is not known to reelforge; installing for the CPU" >&2 ;;
    esac
  fi
fi
case $BACKEND in
  cpu | cuda | rtx) extras=export,serve,$BACKEND ;;
  tensorrt) extras=export,serve,plugins,tensorrt ;;
  *)
    echo "BACKEND=$BACKEND is not known: use cpu, cuda, rtx or tensorrt" >&2
    exit 2
    ;;
esac

if ! "$python" -c 'import ensurepip, venv, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  echo "reelforge needs Python 3.11 or newer with its venv module, and $python is not that: apt-get install python3-venv," >&2
  echo "or name another one: PYTHON=python3.12 sh $0" >&2
  exit 1
fi
"$python" -m venv "$prefix"
"$prefix/bin/python" -m pip install --disable-pip-version-check --constraint "$source/constraints.txt" "${source}[${extras}]"
if [ "$BACKEND" = cuda ]; then
  # The compiler brings ONNX Runtime for the CPU, whose files are those of the one for GPUs: the last to come wins.
  "$prefix/bin/python" -m pip uninstall --disable-pip-version-check --yes onnxruntime
  "$prefix/bin/python" -m pip install --disable-pip-version-check --constraint "$source/constraints.txt" \
    --force-reinstall --no-deps onnxruntime-gpu
fi

mkdir -p "$bin"
for command in build-engine reelforge; do
  ln -sf "$prefix/bin/$command" "$bin/$command"
done
echo "installed in $prefix for $BACKEND; build-engine and reelforge are in $bin"
echo "next: $bin/reelforge recipes, then $bin/build-engine CHECKPOINT -o my.bundle --recipe NAME"
case ":$PATH:" in
  *":$bin:"*) ;;
  *) echo "add it to your PATH:  export PATH=$bin:\$PATH" ;;
esac
