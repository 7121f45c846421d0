# shellcheck shell=bash
# Finds or creates a Python environment with the packages of pyproject.toml. Sourced by run_train.sh and run_tests.sh.
#
#   setup_python [test]    sets and exports PYTHON, PYTHONPATH and PYTHONSAFEPATH, or exits with instructions
#
# It uses the first of these that has all packages:
#   1. $PYTHON, or python3 if PYTHON is unset;
#   2. .venv in the repository, if its stamp matches this pyproject.toml (without a stamp: if it has all packages);
#   3. .venv, created or completed now.
#
# Before creating .venv it calls before_installation PYTHON, which a script may define, with the Python to create it with.
#
# With TITANREPA_TORCH=2.11, it uses only .venv-torch-2.11, a separate environment with that release of PyTorch.

setup_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
setup_venv=$setup_root/.venv${TITANREPA_TORCH:+-torch-$TITANREPA_TORCH}
# Contains "installing", or the checksum of the pyproject.toml that was installed. A .venv without it is the user's.
setup_stamp=$setup_venv/.titanrepa

setup_say() { printf 'titanrepa: %s\n' "$*" >&2; }

setup_fail() {
  setup_say "$@"
  exit 1
}

# setup_check PYTHON [test]: returns 0 if all packages are installed, 3 if Python is older than 3.10, 4 if packages
# are missing (prints them), anything else if it does not run. Reads metadata only: importing torch takes seconds.
setup_check() {
  "$1" - "$setup_root/pyproject.toml" "${@:2}" 2>/dev/null <<'EOF'
import sys

if sys.version_info < (3, 10):
    sys.exit(3)
import re
from importlib import metadata, util

try:
    import tomllib
except ImportError:
    try:
        import tomli as tomllib
    except ImportError:
        print("tomli")
        sys.exit(4)

with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)["project"]
requirements = list(project["dependencies"])
for extra in sys.argv[2:]:
    requirements += project["optional-dependencies"][extra]


def numbers(version):
    return [int(n) for n in re.match(r"\d+(\.\d+)*", version).group().split(".")]


lacking = []
for requirement in requirements:
    below = re.search(r"python_version\s*<\s*['\"]([\d.]+)", requirement)
    if below and list(sys.version_info[:2]) >= numbers(below.group(1)):
        continue
    name = re.match(r"[\w.-]+", requirement).group()
    at_least = re.search(r">=\s*([\d.]+)", requirement)
    module = {"pillow": "PIL", "pytest-xdist": "xdist"}.get(name, name.replace("-", "_"))
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        found = None
    if found is None or util.find_spec(module) is None:
        lacking.append(name)
    elif at_least and numbers(found) < numbers(at_least.group(1)):
        lacking.append("%s>=%s (it has %s)" % (name, at_least.group(1), found))
print(", ".join(lacking))
sys.exit(4 if lacking else 0)
EOF
}

declare -F before_installation >/dev/null || before_installation() { :; }

setup_checksum() { cksum <"$setup_root/pyproject.toml"; }

setup_venv_complete() { # [test]
  [[ -x $setup_venv/bin/python ]] || return 1
  if [[ -e $setup_stamp ]]; then
    [[ $(<"$setup_stamp") == "$(setup_checksum)" ]]
  else
    setup_check "$setup_venv/bin/python" "$@" >/dev/null
  fi
}

# Prints a Python >= 3.10 to create the environment with: the given one, or the newest of python3.10 to python3.13.
setup_base() {
  local candidate status
  for candidate in "$1" python3.13 python3.12 python3.11 python3.10; do
    status=0
    setup_check "$candidate" >/dev/null || status=$?
    if ((status == 0 || status == 4)); then
      echo "$candidate"
      return
    fi
    # If the user set PYTHON, try no other.
    [[ -z ${PYTHON:-} ]] || break
  done
  setup_fail "$1 is not a Python 3.10 or newer ($("$1" --version 2>&1 | head -n 1 || true))." \
    "Install one, or name one: PYTHON=/path/to/python3 $0 ..."
}

setup_install() {
  local base=$1
  "$base" -c 'import ensurepip, venv' 2>/dev/null || setup_fail \
    "$base cannot make virtual environments; on Debian and Ubuntu: apt install" \
    "python$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"
  if [[ -e $setup_stamp && $(<"$setup_stamp") == installing ]] ||
    { [[ -e $setup_venv ]] && ! "$setup_venv/bin/python" -c '' 2>/dev/null; }; then
    setup_say "removing the unfinished or broken ${setup_venv##*/}"
    rm -rf "$setup_venv"
  fi
  mkdir -p "$setup_venv" || setup_fail "cannot write to $setup_root; install the packages of pyproject.toml" \
    "into a Python of yours and name it: PYTHON=/path/to/python3 $0 ..."
  # Write the stamp first: after an interruption, the next start removes the folder and installs again.
  echo installing >"$setup_stamp"
  setup_say "installing PyTorch and the other packages into ${setup_venv##*/}; this takes minutes and some gigabytes, once"
  if [[ ! -x $setup_venv/bin/python ]]; then
    "$base" -m venv "$setup_venv" || setup_fail "$base could not make $setup_venv (see above)"
  fi
  (cd "$setup_root" && "$setup_venv/bin/python" -m pip install --quiet --disable-pip-version-check -e '.[test]' \
    ${TITANREPA_TORCH:+"torch==$TITANREPA_TORCH.*"}) ||
    setup_fail "installing failed (pip's message is above). It needs a network and free disk space; start again to" \
      "go on. Without a network: install the packages of pyproject.toml in your own way into a Python and name it:" \
      "PYTHON=/path/to/python3 $0 ..."
  setup_checksum >"$setup_stamp"
  setup_say "installed"
}

setup_python() { # [test]
  local wanted=${PYTHON:-python3} base
  if [[ -z ${TITANREPA_TORCH:-} ]] && setup_check "$wanted" "$@" >/dev/null; then
    PYTHON=$wanted
  elif setup_venv_complete "$@"; then
    PYTHON=$setup_venv/bin/python
  else
    base=$(setup_base "$wanted")
    before_installation "$base"
    if command -v flock >/dev/null && [[ -w $setup_root/pyproject.toml ]]; then
      # Of two concurrent starts, the second waits here, then finds the environment complete.
      exec 9>>"$setup_root/pyproject.toml"
      flock -n 9 || {
        setup_say "another start is installing; waiting for it"
        flock 9
      }
    fi
    setup_venv_complete "$@" || setup_install "$base"
    exec 9>&-
    PYTHON=$setup_venv/bin/python
  fi
  # The repository's packages take precedence over others of the same name; the current folder comes last.
  PYTHONPATH=$setup_root${PYTHONPATH:+:$PYTHONPATH}:$PWD
  PYTHONSAFEPATH=1
  export PYTHON PYTHONPATH PYTHONSAFEPATH
}
