#!/bin/sh
# Runs a compiler and fails where ptxas says that it serializes wgmma or ignores setmaxnreg: (C7510) and its like come as
# remarks, which no option turns into errors, and cost half of the speed.
log=$(mktemp)
"$@" >"$log" 2>&1
status=$?
cat "$log"
if grep -q '(C75[0-9][0-9])' "$log"; then
  echo 'error: ptxas does not compile this kernel as it was meant (see above)'
  status=1
fi
rm -f "$log"
exit $status
