#!/usr/bin/env bash
# Makes what is released, of the version in pyproject.toml: the wheel, the source archive, and the
# formula for a Homebrew tap, which names the archive where a GitHub release has it.
# Usage: scripts/release.sh HOMEPAGE [FOLDER]   e.g. https://github.com/OWNER/tqstack
set -euo pipefail
homepage=${1:?HOMEPAGE is missing: the address of the repository}
folder=${2:-dist}
# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
(cd "$root" && "$venv/bin/python" -m hatchling build -d "$folder")
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' "$root/pyproject.toml")
archive=tqstack-$version.tar.gz
sum=$("$venv/bin/python" -c 'import hashlib, sys
print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$folder/$archive")
sed -e '/^# Words between/d' -e "s|@HOMEPAGE@|$homepage|" -e "s|@SHA256@|$sum|" \
  -e "s|@URL@|$homepage/releases/download/v$version/$archive|" \
  "$root/scripts/homebrew/tqstack.rb" >"$folder/tqstack.rb"
echo "$folder/tqstack.rb"
