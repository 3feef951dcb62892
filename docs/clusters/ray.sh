#!/bin/bash
# A Ray cluster by hand, and a pipeline on it. On the first machine: HEAD=its-address ./ray.sh head
# On every other machine:                                              HEAD=its-address ./ray.sh
# Then, on the first machine:                                          HEAD=its-address ./ray.sh run
set -eu
SHARED=${SHARED:-/shared} # a disk that all machines have
PORT=${PORT:-6379}
export RAY_AUTH_MODE=token # whoever reaches Ray's ports may run code: see `ray get-auth-token --generate`

case "${1:-worker}" in
head) ray start --head --node-ip-address "$HEAD" --port "$PORT" --disable-usage-stats ;;
worker) ray start --address "$HEAD:$PORT" ;;
run)
    exec gemma2 pipeline run "$SHARED/align.yaml" --out "$SHARED/align" --jobs 4 \
        --executor ray --ray-address "$HEAD:$PORT"
    ;;
esac
