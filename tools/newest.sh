#!/usr/bin/env bash
# A weekly job: the tests under the newest torch, and what it changed. Needs git, make and the package index.
#
#   tools/newest.sh [release]      without a release, the newest that pip finds
#
# It works in a copy of the last commit, so nothing here changes. A release beyond the supported ones is let in
# there. What is printed: the release, which private names of torch moved since the pinned one, and what fails.
# The exit status is that of the tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
make --silent setup >&2
pinned=$(sed -n 's/^torch==//p' constraints.txt)
newest=${1:-$(.venv/bin/python -m pip index versions torch 2>/dev/null | sed -n '1s/.*(\(.*\)).*/\1/p')}
[ -n "$newest" ] || { echo "pip finds no release of torch" >&2; exit 1; }

copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git archive HEAD | tar -x -C "$copy"
IFS=. read -r major minor _ <<<"$newest"
last=$(sed -n 's/^FIRST_TORCH, AFTER_LAST_TORCH = .*, (\([0-9]*\), \([0-9]*\))$/\1 \2/p' inductor_ce/common/errors.py)
read -r last_major last_minor <<<"$last"
if (( major * 1000 + minor >= last_major * 1000 + last_minor )); then
    echo "torch $newest is beyond the supported releases: let in for this run"
    sed -i "s/^\(FIRST_TORCH, AFTER_LAST_TORCH = .*\), ($last_major, $last_minor)$/\1, ($major, $((minor + 1)))/" \
        "$copy/inductor_ce/common/errors.py"
    sed -i "s/<$last_major\.$last_minor\"/<$major.$((minor + 1))\"/" "$copy/pyproject.toml"
fi

echo "torch: pinned $pinned, newest $newest"
make -C "$copy" --silent setup TORCH="$newest" >&2
echo "private names that moved (-: $pinned, +: $newest):"
PYTHONWARNINGS=ignore .venv/bin/python tools/private_names.py >"$copy/pinned.txt"
PYTHONWARNINGS=ignore "$copy/.venv-$newest/bin/python" "$copy/tools/private_names.py" >"$copy/newest.txt"
diff -U0 "$copy/pinned.txt" "$copy/newest.txt" | sed -n '/^[-+][^-+]/p'
echo "tests:"
make -C "$copy" --silent test TORCH="$newest" ARGS="-q --no-header --tb=no"
