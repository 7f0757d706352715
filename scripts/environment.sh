# Sourced by scripts/quickstart and scripts/test: the environment in .venv, made or brought up to date.
# usage: prepare_environment [EXTRA [FOLDER REQUIREMENT]]
# Without EXTRA: hf. FOLDER: another one than .venv, with this requirement in addition.
# PYTHON=... chooses the interpreter (3.11 or newer).

prepare_environment() {
  local extra=${1:-} venv=${2:-.venv} requirement=${3:-} python=${PYTHON:-python3} wanted stamp
  stamp=$venv/.tptrain
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
    echo "error: tptrain needs Python 3.11 or newer, and \`$python\` is not. Name one: PYTHON=python3.12 $0" >&2
    exit 2
  }
  if ! "$venv/bin/python" -c '' 2>/dev/null; then
    rm -rf "$venv"
    "$python" -m venv "$venv" || {
      echo "error: \`$python -m venv\` failed. On Debian and Ubuntu: apt install python3-venv" >&2
      exit 1
    }
  fi
  wanted="$(cksum <pyproject.toml) $PWD"
  [ -n "$extra" ] || extra=$(sed -n "s/^extra //p" "$stamp" 2>/dev/null || true) # keep what is there already
  extra=${extra:-hf}
  [ "$(cat "$stamp" 2>/dev/null || true)" = "$wanted
extra $extra" ] && return
  echo "installing into $venv (the first time this takes some minutes: torch is large) ..."
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e ".[$extra]" ${requirement:+"$requirement"}
  printf '%s\nextra %s\n' "$wanted" "$extra" >"$stamp"
}
