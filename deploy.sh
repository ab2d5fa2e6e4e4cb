#!/usr/bin/env bash
# Build, deploy, verify and redeploy the function in CVAT's Nuclio; ./deploy.sh --help says how.
#
# What is deployed together is a release, a folder of $STATE/releases: image, function files, settings and the
# answers that its weights must give. The links `current`, `previous` and `pending` name releases. A release becomes
# current only after every function of it has answered as it must: whatever interrupts a run leaves one to go back to.
set -euo pipefail
umask 077 # function files may hold a CVAT token

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
IMAGE=advcam-defects
SAMPLE=$ROOT/docs/sample.jpg
SAMPLE_CLICK='[746.0, 469.0]' # on a crack of the sample photo
TITLE_MAX=24                  # characters of a name that CVAT's model list shows
READY_SECONDS=${READY_SECONDS:-300}
ANSWER_SECONDS=${ANSWER_SECONDS:-300} # a CPU may take minutes for the sample with many climbing steps
DRIVER=580                            # NVIDIA's, the first for CUDA 13, which PyTorch brings along
NUCLIO_VERSION=$(sed -n 's/^ARG NUCLIO_VERSION=//p' "$ROOT/Dockerfile")

usage() {
    cat <<'EOF'
usage: ./deploy.sh cpu|gpu [options]   build the image, deploy the function and its presets, verify them
       ./deploy.sh weights DIR         verify a new weights folder and deploy it in place of the present weights
       ./deploy.sh rollback            go back to the release before
       ./deploy.sh status              what is deployed, where, with which weights
       ./deploy.sh remove              delete the functions, their images and the record of releases

Every run of cpu or gpu deploys what its command line says, and deletes functions of the last run that it does not
name. If a deployed function does not answer as its weights must, everything goes back to the release before.

options of cpu and gpu:
  --iterations LIST     one more entry in CVAT's model list for each number of climbing steps, e.g. 0,2,8
  --presets FILE        further entries, one a line: NAME | key=value ..., NAME as CVAT shows it (24 characters),
                        keys as in README.md, "Settings", e.g.
                          AdvCAM fine cracks | defects=crack iterations=8 cam_threshold=0.2
  --min-replicas N      Kubernetes: least and greatest number of copies of each function
  --max-replicas N

options of every command:
  --platform local|kube Docker on this machine (the default), or the cluster of kubectl's current context
  --namespace NAME      where CVAT looks for functions (default: nuclio)
  --registry URL        Kubernetes, for cpu and gpu: where the image is pushed to and pulled from,
                        e.g. registry.example.org/cvat
  --cvat DIR            CVAT's repository, for the version of its Nuclio; otherwise that of the running one
  --dry-run             print every command, one a line, and run none; function files are written to be read
  --help

With ADVCAM_CVAT_URL and ADVCAM_CVAT_TOKEN in the environment the functions read T from the labels of the CVAT task
that is being annotated (docs/cvat.md).
EOF
}

say() { printf '%s\n' "$*" >&2 || true; } # a closed terminal must not end the way back
die() {
    printf 'deploy.sh: %s\n' "$@" >&2
    exit 1
}

# Run a command, or only print it.
call() {
    if [[ -n $dry_run ]]; then
        local line
        printf -v line '%q ' "$@"
        printf '%s\n' "${line% }" >&3
    else
        "$@"
    fi
}

# ---------------------------------------------------------------------------------------------- command line

parse_arguments() {
    command='' argument='' dry_run='' platform=local namespace=nuclio registry='' cvat='' presets='' iterations=''
    min_replicas='' max_replicas=''
    while (($#)); do
        case $1 in
            --help | -h)
                usage
                exit
                ;;
            --dry-run) dry_run=yes ;;
            --platform | --namespace | --registry | --cvat | \
                --iterations | --presets | --min-replicas | --max-replicas)
                (($# > 1)) || die "$1 needs a value; ./deploy.sh --help"
                local name=${1#--}
                printf -v "${name//-/_}" '%s' "$2"
                shift
                ;;
            -*) die "unknown option '$1'; ./deploy.sh --help" ;;
            *)
                if [[ $command == weights && -z $argument ]]; then # whatever the folder is called
                    argument=$1
                    shift
                    continue
                fi
                [[ $1 =~ ^(cpu|gpu|weights|rollback|status|remove)$ ]] || die "unknown command '$1'; ./deploy.sh --help"
                [[ -z $command ]] || die "two commands, '$command' and '$1'; ./deploy.sh --help"
                command=$1
                ;;
        esac
        shift
    done
    [[ -n $command ]] || {
        usage >&2
        exit 2
    }
    [[ $platform == local || $platform == kube ]] || die "--platform is '$platform', but must be local or kube"
    [[ $namespace =~ ^[a-z0-9]([a-z0-9-]*[a-z0-9])?$ ]] || die "--namespace is '$namespace', no Kubernetes name"
    local option
    for option in min_replicas max_replicas; do
        [[ -z ${!option} || ${!option} =~ ^[0-9]+$ ]] || die "--${option/_/-} is '${!option}', but must be a number"
        [[ -z ${!option} || $platform == kube ]] || die "--${option/_/-} needs --platform kube: Docker runs one copy"
    done
    if [[ $command != cpu && $command != gpu && -n $iterations$presets$min_replicas$max_replicas ]]; then
        die "--iterations, --presets and replicas belong to cpu and gpu: '$command' keeps what is deployed"
    fi
    if [[ $platform == kube && -z $registry && $command =~ ^(cpu|gpu)$ ]]; then
        die "--platform kube needs --registry: the cluster pulls the image from there"
    fi
    if [[ $command == weights ]]; then
        [[ -n $argument ]] || die "weights needs a folder: ./deploy.sh weights DIR"
        [[ -f $argument/manifest.json ]] || die "no weights in '$argument': it has no manifest.json"
        compgen -G "$argument/*.safetensors" >/dev/null || die "no weights in '$argument': it has no *.safetensors"
    fi
    where=(--platform "$platform" --namespace "$namespace")
}

# ---------------------------------------------------------------------------------------------- what is needed

check_needs() {
    local missing=() tools=(docker nuctl curl) tool
    [[ $platform == local ]] || tools+=(kubectl)
    if [[ -z $dry_run ]]; then
        for tool in "${tools[@]}"; do
            command -v "$tool" >/dev/null || missing+=("$tool is not installed, or not in PATH")
        done
        ((${#missing[@]} == 0)) || die "${missing[@]}"
    fi
    call docker info --format '{{.ServerVersion}}' >/dev/null ||
        die "docker does not answer: start its daemon, or join the group that may use it"
    [[ $command =~ ^(cpu|gpu|weights)$ ]] || return 0
    check_nuclio_version
    [[ $device != gpu ]] || check_gpu
    check_disk
    [[ $platform == local ]] || call kubectl get namespace "$namespace" >/dev/null ||
        die "the cluster has no namespace '$namespace': name CVAT's with --namespace"
}

# CVAT's dashboard, the processor in the image and nuctl must be of one version.
check_nuclio_version() {
    local compose=$cvat/components/serverless/docker-compose.serverless.yml images client
    if [[ -n $cvat ]]; then
        [[ -f $compose ]] || die "--cvat is '$cvat', but $compose does not exist"
        images=$(<"$compose")
    elif [[ $platform == kube ]]; then
        images=$(call kubectl get deployments --namespace "$namespace" --output 'jsonpath={..image}')
    else
        images=$(call docker inspect --format '{{.Config.Image}}' nuclio 2>/dev/null) || images=''
    fi
    client=$(call nuctl version) || die "nuctl version fails: install nuctl again"
    if [[ $images =~ nuclio/dashboard:([0-9]+\.[0-9]+\.[0-9]+) ]]; then
        NUCLIO_VERSION=${BASH_REMATCH[1]}
    elif [[ -z $dry_run ]]; then
        die "no Nuclio dashboard is running: start CVAT with its serverless compose file, or give --cvat DIR"
    fi
    [[ -z $dry_run ]] || return 0
    [[ $client =~ Label:\ ([0-9.]+) ]] || die "nuctl does not tell its version: $client"
    [[ ${BASH_REMATCH[1]} == "$NUCLIO_VERSION" ]] ||
        die "nuctl is ${BASH_REMATCH[1]}, but CVAT runs Nuclio $NUCLIO_VERSION: install nuctl $NUCLIO_VERSION"
}

check_gpu() {
    local found
    if [[ $platform == kube ]]; then
        found=$(call kubectl get nodes --output 'jsonpath={..allocatable.nvidia\.com/gpu}')
        [[ -n $dry_run || $found =~ [1-9] ]] ||
            die "no node of the cluster offers nvidia.com/gpu: install NVIDIA's device plugin"
    else
        found=$(call docker info --format '{{json .Runtimes}}')
        [[ -n $dry_run || $found == *nvidia* ]] ||
            die "docker has no NVIDIA runtime: install NVIDIA Container Toolkit, then nvidia-ctk runtime configure"
    fi
}

check_disk() {
    local needed=8 folder free
    [[ $device != gpu ]] || needed=25 # GB: PyTorch with CUDA, once in the build and once in the image
    [[ $command != weights ]] || needed=2
    folder=$(call docker info --format '{{.DockerRootDir}}')
    [[ -z $dry_run && -d $folder ]] || return 0 # without it the daemon is on another machine
    free=$(df -Pk "$folder" | awk 'NR == 2 { print int($4 / 1e6) }')
    ((free >= needed)) ||
        die "$folder has $free GB free, but $needed GB are needed: docker system prune, or a larger disk"
}

# ---------------------------------------------------------------------------------------------- a release

release_of() { # the name of the release that a link points to; nothing where there is no link
    local path
    path=$(readlink "$STATE/$1" 2>/dev/null) || return 0
    printf '%s' "${path##*/}"
}

read_links() { current=$(release_of current) previous=$(release_of previous) pending=$(release_of pending); }

point() { # point LINK RELEASE: in one step, so that no interruption leaves half a link
    ln -sfn "releases/$2" "$STATE/$1.new"
    mv -T "$STATE/$1.new" "$STATE/$1"
}

new_release() { # sets $release and $folder
    release=dry-run
    [[ -z $dry_run ]] || rm -rf "$STATE/releases/$release"
    until [[ -n $dry_run ]] || { release=$(date -u +%Y%m%d-%H%M%S) && [[ ! -e $STATE/releases/$release ]]; }; do
        sleep 0.2 # a run of this very second was cut off: names are times, the next second has its own
    done
    folder=$STATE/releases/$release
    mkdir -p "$folder"/{functions,settings,answers} || die "cannot write to $STATE/releases"
}

functions_of() { # names of a release's functions, the default first
    [[ -z $1 ]] || cat "$STATE/releases/$1/names"
}

# add_function TEMPLATE NAME TITLE [KEY=VALUE ...]: NAME and TITLE may be empty for the template's own.
#
# nuctl could override all but two things: it cuts an annotation at its second "=", and it builds again, whatever
# --run-image says, as long as the file has spec.build. Hence a file for each function.
add_function() {
    local template=$1 name=$2 title=$3 setting secret=()
    shift 3
    name=${name:-$(sed -n 's/^  name: *\([^ #]*\).*/\1/p' "$template")}
    title=${title:-$(sed -n 's/^    name: *\([^#]*[^ #]\).*/\1/p' "$template")}
    ((${#title} <= TITLE_MAX)) || die "'$title' has ${#title} characters, but CVAT shows $TITLE_MAX: shorten it"
    ! grep -qxF "$name" "$folder/names" 2>/dev/null || die "two entries named '$title' ($name): rename one"
    for setting in ADVCAM_CVAT_URL ADVCAM_CVAT_TOKEN; do
        # An entry with a T of its own is chosen for that T: the task's label must not replace it.
        [[ -n ${!setting:-} && " $* " != *" ADVCAM_ITERATIONS="* ]] || continue
        [[ ${!setting} != *[\"\\[:space:]]* ]] || die "$setting has a quote, a backslash or a space in it"
        secret+=("$setting=${!setting}")
    done
    awk -v name="$name" -v title="$title" -v device="$device" -v secrets="${secret[*]}" '
        /^  build:/ { skipping = 1; next }
        /^  [a-z]/ || /^[^ ]/ { skipping = 0 }
        skipping { next }
        /^  name:/ { print "  name: " name; next }
        /^    name:/ { print "    name: \"" title "\""; next }
        /^    - name: ADVCAM_DEVICE/ {
            print; getline; print "      value: " (device == "gpu" ? "cuda" : "cpu"); next
        }
        { print }
        /^  env:/ {
            count = split(secrets, lines, " ")
            for (i = 1; i <= count; i++) {
                at = index(lines[i], "=")
                print "    - name: " substr(lines[i], 1, at - 1)
                print "      value: \"" substr(lines[i], at + 1) "\""
            }
        }' "$template" >"$folder/functions/$name.yaml"
    (($# == 0)) || printf '%s\n' "$@" >"$folder/settings/$name"
    printf '%s\n' "$title" >"$folder/functions/$name.title"
    printf '%s\n' "$name" >>"$folder/names"
}

# add_preset TITLE KEY=VALUE ...: one more entry in CVAT's model list, keys as in a request.
add_preset() {
    local title=$1 name setting settings=()
    shift
    [[ $title =~ ^[A-Za-z0-9][A-Za-z0-9\ =.,+-]*$ ]] ||
        die "a preset's name is '$title', but may have letters, digits, spaces and =.,+- only"
    (($# > 0)) || die "preset '$title' sets nothing: NAME | key=value ..."
    for setting in "$@"; do
        [[ ${setting%%=*} =~ ^(iterations|threshold|cam_threshold|snap|defects|shape|tolerance_px|hole_share)$ &&
            $setting == *=?* ]] ||
            die "preset '$title' has '$setting', but needs key=value with a key of README.md, \"Settings\""
        if [[ $setting == iterations=* ]] && ! grep -q "\"iterations\".*\"${setting#*=}\"" "$template"; then
            say "note: the labels have no iterations '${setting#*=}': its shapes will show the task's default"
        fi
        name=${setting%%=*}
        settings+=("ADVCAM_${name^^}=${setting#*=}")
    done
    name=$(tr -cs '[:alnum:]' - <<<"${title,,}")
    add_function "$template" "${name%-}" "$title" "${settings[@]}"
}

describe_release() { # the functions that cpu and gpu were asked for
    local template=$ROOT/function.yaml line count
    [[ $device != gpu ]] || template=$ROOT/function-gpu.yaml
    add_function "$template" '' ''
    if [[ -n $iterations ]]; then
        for count in ${iterations//,/ }; do
            [[ $count == auto || ($count =~ ^[0-9]{1,2}$ && $((10#$count)) -le 50) ]] ||
                die "--iterations has '$count', but may have numbers from 0 to 50 and auto, as in 0,2,8"
            add_preset "AdvCAM defects T=$count" "iterations=$count"
        done
    fi
    if [[ -n $presets ]]; then
        [[ -f $presets ]] || die "--presets is '$presets', but there is no such file"
        while IFS= read -r line || [[ -n $line ]]; do
            line=${line%%#*}
            [[ $line == *[![:space:]]* ]] || continue
            [[ $line == *'|'* ]] || die "$presets has '$line', but a line must be: NAME | key=value ..."
            local title words
            read -r title <<<"${line%%|*}"
            read -ra words <<<"${line#*|}"
            add_preset "$title" "${words[@]}"
        done <"$presets"
    fi
    [[ ! -f $ROOT/interactor.yaml ]] || add_function "$ROOT/interactor.yaml" '' ''
}

suppose_release() { # for a dry run where nothing is deployed yet: as if cpu had been run
    device=cpu
    new_release
    describe_release
    name_image "$IMAGE" "$IMAGE:code-cpu-RELEASE"
    rm -rf "$STATE/releases/RELEASE"
    mv "$folder" "$STATE/releases/RELEASE"
    current=RELEASE
}

build_image() {
    local arguments=(--build-arg "NUCLIO_VERSION=$NUCLIO_VERSION" --build-arg "DEVICE=$device") repository=$IMAGE
    [[ -z $registry ]] || repository=${registry%/}/$IMAGE
    name_image "$repository" "$repository:code-$device-$release"
    say "building $image"
    call docker build "${arguments[@]}" --target code --tag "$code" "$ROOT" >&2
    call docker build "${arguments[@]}" --tag "$image" "$ROOT" >&2
}

# New weights on the code that runs now. They are copied into the release first: what is verified is what is deployed.
build_weights() {
    name_image "${current_code%:*}" "$current_code"
    mkdir "$folder/weights"
    cp "$argument"/manifest.json "$argument"/*.safetensors "$folder/weights"
    chmod -R a+rX "$folder/weights" # the function does not run as root
    printf 'FROM %s\nCOPY . weights/\n' "$code" >"$folder/Dockerfile"
    say "building $image with the weights of $argument"
    call docker build --tag "$image" --file "$folder/Dockerfile" "$folder/weights" >&2
}

name_image() { # name_image REPOSITORY CODE: written down before anything is built, so that it can be deleted later
    image=$1:$device-$release code=$2
    printf '%s\n' "$image" >"$folder/image"
    printf '%s\n' "$code" >"$folder/code"
    printf '%s\n' "$device" >"$folder/device"
}

# ---------------------------------------------------------------------------------------------- right answers

# Python programs for the image get there by stdin, then a form feed and their data: a dry run's lines stay lines.
RUN_STDIN='import sys; program, data = sys.stdin.read().split("\f"); exec(program)'

# What the function says of itself and its answer to a request, a line each, as main.py gives them without Nuclio.
ANSWER_PROGRAM='
import logging
import nuclio_sdk
import main
context = nuclio_sdk.Context(nuclio_sdk.Logger(logging.WARNING))
main.init_context(context)
request = nuclio_sdk.Event(method="POST", body=data.encode(), content_type="application/json")
for event in (nuclio_sdk.Event(method="GET"), request):
    answer = main.handler(context, event)
    if answer.status_code != 200:
        sys.exit(answer.body)
    print(answer.body, flush=True)
'

# Two such pairs of lines, expected and found: exit with the difference, if there is one. Outlines may differ by a
# little, since a GPU does not add up in the same order every time.
COMPARE_PROGRAM='
import json
import numpy as np
from PIL import Image, ImageDraw
def regions(answer):
    if isinstance(answer, dict):
        return {"mask": np.array(answer["mask"]) > 0}
    found = {}
    for shape in answer:
        region = found.setdefault(shape["label"], Image.new("1", (4096, 4096)))
        if "mask" in shape:
            *bits, left, top, right, bottom = map(int, shape["mask"])
            bits = Image.fromarray(np.uint8(bits).reshape(bottom - top + 1, -1) * 255)
            region.paste(1, (left, top), bits.convert("1"))
        elif "points" in shape:
            ImageDraw.Draw(region).polygon(shape["points"], fill=1)
    return {label: np.array(region) for label, region in found.items()}
expected, expected_answer, found, found_answer = map(json.loads, data.splitlines())
for key in ("version", "weights", "defects", "defaults"):
    if expected.get(key) != found.get(key):
        sys.exit(f"{key}: it says {found.get(key)}, expected {expected.get(key)}")
expected, found = regions(expected_answer), regions(found_answer)
if set(expected) != set(found):
    sys.exit(f"labels: it answers {sorted(found)}, expected {sorted(expected)}")
for label in expected:
    either = (expected[label] | found[label]).sum()
    overlap = (expected[label] & found[label]).sum() / either if either else 1
    if overlap < 0.95:
        sys.exit(f"{label}: overlap (IoU) with the expected proposals is {overlap:.2f}")
'

# run_program PROGRAM DOCKER_OPTION ... IMAGE, its data on stdin
run_program() {
    local program=$1
    shift
    set -- docker run --rm --interactive "$@" python -c "$RUN_STDIN"
    if [[ -n $dry_run ]]; then
        call "$@"
    else
        { printf '%s\f' "$program" && cat; } | "$@"
    fi
}

write_requests() { # the sample as CVAT sends it, to a detector and to an interactor
    local encoded
    encoded=$(base64 <"$SAMPLE" | tr -d '\n')
    printf '{"image": "%s"}' "$encoded" >"$folder/detector.json"
    printf '{"image": "%s", "pos_points": [%s], "neg_points": [], "obj_bbox": null}' "$encoded" "$SAMPLE_CLICK" \
        >"$folder/interactor.json"
}

request_for() { # request_for RELEASE NAME
    if grep -q '^ *type: *interactor' "$STATE/releases/$1/functions/$2.yaml"; then
        printf '%s' "$STATE/releases/$1/interactor.json"
    else
        printf '%s' "$STATE/releases/$1/detector.json"
    fi
}

# What a function file's env sets of the model, KEY=VALUE a line; not what names CVAT or a folder that is mounted when
# it is deployed, and no device where the function runs on another machine.
file_settings() {
    local others='LOG_DIR|WEIGHTS|CVAT_.*'
    [[ $platform == local ]] || others+='|DEVICE'
    awk '
        function flush() { if (name ~ /^ADVCAM_/ && value != "") print name "=" value; name = value = "" }
        /^  env:/ { inside = 1; next }
        /^  [a-z]/ || /^[^ #]/ { inside = 0 }
        !inside || /^ *#/ { next }
        /^ *- / { flush() }
        match($0, /name: *[A-Z_]+/) { name = substr($0, RSTART, RLENGTH); sub(/name: */, "", name) }
        match($0, /value: */) {
            value = substr($0, RSTART + RLENGTH)
            if (value ~ /^["\047]/) value = substr(value, 2, index(substr(value, 2), substr(value, 1, 1)) - 1)
            else if (/{/) sub(/ *[,}].*/, "", value)
            else sub(/ +#.*| +$/, "", value)
        }
        END { flush() }' "$1" | grep -vE "^ADVCAM_($others)=" || true
}

# settings_as_options RELEASE NAME: sets $options to --env KEY=VALUE ..., which docker and nuctl share.
settings_as_options() {
    local setting
    options=()
    [[ ! -f $STATE/releases/$1/settings/$2 ]] || while IFS= read -r setting; do
        options+=(--env "$setting")
    done <"$STATE/releases/$1/settings/$2"
}

# What every function must answer, from the image itself. It proves weights and settings before anything is touched.
work_out_answers() {
    local name setting options own gpus=() advice=''
    if [[ $device == gpu && $platform == local ]]; then
        gpus=(--gpus all --env ADVCAM_DEVICE=cuda) # without it a GPU that PyTorch cannot use would be passed over
        advice="; a GPU needs NVIDIA's driver $DRIVER or newer: nvidia-smi"
    fi
    for name in $(functions_of "$release"); do
        say "working out what $name must answer"
        settings_as_options "$release" "$name"
        own=()
        while IFS= read -r setting; do
            own+=(--env "$setting")
        done < <(file_settings "$folder/functions/$name.yaml")
        # Of a variable given twice the last one counts: the file's, then the preset's.
        run_program "$ANSWER_PROGRAM" ${gpus[@]+"${gpus[@]}"} ${own[@]+"${own[@]}"} ${options[@]+"${options[@]}"} \
            "$image" <"$(request_for "$release" "$name")" >"$folder/answers/$name" ||
            die "$name cannot be deployed: its image, weights or settings do not work (see above)$advice"
        ! grep -q '"unprocessed"' <(tail -n 1 "$folder/answers/$name") ||
            die "$name cannot process $SAMPLE: $(tail -n 1 "$folder/answers/$name")"
    done
}

# The T that these weights answer with comes first in its label's select: "From model" makes the first one the default.
put_iterations_first() {
    local name said defect steps
    name=$(functions_of "$release" | head -n 1)
    said=$(head -n 1 "$folder/answers/$name")
    while IFS= read -r defect; do
        steps=$(sed -n "s/.*\"$defect\": *{[^}]*\"iterations\": *\"\{0,1\}\([a-z0-9]*\).*/\1/p" <<<"$said")
        [[ -n $steps ]] || continue # no weights for it, or a dry run
        sed -i "/{\"name\": \"$defect\"/,/\"name\": \"iterations\"/ {
            s/\(\"name\": \"iterations\".*\"values\": \[\)/\1\"$steps\", /
            s/\(\"values\": \[\"$steps\".*\), \"$steps\"/\1/
        }" "$folder"/functions/*.yaml
    done < <(sed -n 's/^.*{"name": "\([^"]*\)", "type": "polygon".*$/\1/p' "$folder/functions/$name.yaml")
}

# ---------------------------------------------------------------------------------------------- deploying

ask() { call curl --noproxy '*' --silent --fail "$@"; } # a function: on this machine, whatever proxy the network has

# reach NAME: sets $url to where this machine reaches a deployed function.
reach() {
    hang_up
    url=http://localhost:PORT/
    if [[ -n $dry_run ]]; then
        if [[ $platform == kube ]]; then
            call kubectl port-forward --namespace "$namespace" "service/nuclio-$1" :8080
        else
            call docker port "nuclio-$namespace-$1" 8080
        fi
    elif [[ $platform == kube ]]; then
        # Without the lock: if this script is killed, it goes on, and would keep every later run out.
        coproc FORWARD { exec kubectl port-forward --namespace "$namespace" "service/nuclio-$1" :8080 2>&1 9>&-; }
        local line
        IFS= read -r -t 30 line <&"${FORWARD[0]}" && [[ $line =~ 127\.0\.0\.1:([0-9]+) ]] || return 1
        url=http://localhost:${BASH_REMATCH[1]}/
    else
        local address
        address=$(docker port "nuclio-$namespace-$1" 8080 2>/dev/null) && [[ -n $address ]] || return 1
        address=${address%%$'\n'*} # a second line would be the IPv6 one
        url=http://localhost:${address##*:}/
    fi
}

hang_up() { # end the port forwarding of the last reach
    [[ -n ${FORWARD_PID:-} ]] || return 0
    kill "$FORWARD_PID" 2>/dev/null || true
    wait "$FORWARD_PID" 2>/dev/null || true
}

address_of() { # address_of NAME: where CVAT reaches it
    if [[ $platform == kube ]]; then
        printf 'http://nuclio-%s.%s.svc.cluster.local:8080/' "$1" "$namespace"
    else
        printf '%s' "$url"
    fi
}

# is_new RELEASE NAME: on Kubernetes a copy of the last release may answer for a while; its device alone may differ.
is_new() {
    [[ $platform == kube && -z $dry_run ]] || return 0
    local answers=$STATE/releases/$1/answers
    [[ $(head -n 1 "$answers/$2" | no_device) == "$(no_device <"$answers/$2.deployed")" ]]
}

no_device() { sed 's/"device": *"[a-z]*"//'; }

# verify RELEASE NAME: wait until it answers, then compare its answer to the sample with the expected one.
verify() {
    local deadline=$((SECONDS + READY_SECONDS)) answer=$STATE/releases/$1/answers/$2.deployed
    until reach "$2" && ask --max-time 10 --output "$answer" "$url" && is_new "$1" "$2"; do
        ((SECONDS < deadline)) || {
            say "$2 did not get ready, with the weights and settings deployed, within $READY_SECONDS s"
            return 1
        }
        sleep 1
    done
    [[ -n $dry_run ]] || printf '\n' >>"$answer"
    ask --show-error --max-time "$ANSWER_SECONDS" --header 'Content-Type: application/json' --data-binary \
        "@$(request_for "$1" "$2")" "$url" >>"$answer" || return 1
    run_program "$COMPARE_PROGRAM" "$(<"$STATE/releases/$1/image")" \
        < <(cat "$STATE/releases/$1/answers/$2" "$answer") || {
        say "$2 does not answer as its weights must"
        return 1
    }
}

# activate RELEASE: deploy and verify all its functions.
activate() {
    local name options extra
    for name in $(functions_of "$1"); do
        say "deploying $name"
        settings_as_options "$1" "$name"
        extra=()
        [[ ! -f $STATE/releases/$1/options ]] || mapfile -t extra <"$STATE/releases/$1/options"
        [[ $(<"$STATE/releases/$1/device") != gpu ]] ||
            grep -q '^[^#]*nvidia.com/gpu' "$STATE/releases/$1/functions/$name.yaml" ||
            extra+=(--resource-limit nvidia.com/gpu=1)
        call nuctl deploy "$name" --project-name cvat --file "$STATE/releases/$1/functions/$name.yaml" \
            --run-image "$(<"$STATE/releases/$1/image")" ${options[@]+"${options[@]}"} \
            ${extra[@]+"${extra[@]}"} "${where[@]}" >&2 || {
            say "nuctl could not deploy $name (see above)"
            return 1
        }
        verify "$1" "$name" || {
            [[ $platform == kube ]] || call docker logs --tail 20 "nuclio-$namespace-$name" >&2 || true
            return 1
        }
    done
}

# Names of all functions that may be deployed, those of runs that were cut off too. A dry run's folder has none.
functions_of_all() { cat "$STATE"/releases/[0-9]*/names 2>/dev/null | sort -u; }

# Delete all functions but a release's. To delete one that is not there is no error.
delete_others() {
    local names
    names=$(functions_of_all | grep -vxF -f <(functions_of "$1")) || return 0 # there are no others
    delete_functions "$names"
}

# --force: a run that was cut off leaves functions "building", which Nuclio keeps otherwise.
delete_functions() {
    local name failed=0
    for name in $1; do
        say "deleting $name"
        call nuctl delete function "$name" --force "${where[@]}" >&2 || {
            say "nuctl could not delete $name (see above)"
            failed=1
        }
    done
    return "$failed"
}

# switch_to RELEASE: the one way by which a release becomes current. What ends it early, on_exit puts right.
switch_to() {
    if [[ -n $dry_run ]]; then
        activate "$1"
        delete_others "$1"
        return
    fi
    point pending "$1"
    switching=$1
    activate "$1" || exit 1
    switching=''
    [[ -z $current || $current == "$1" ]] || point previous "$current"
    point current "$1"
    delete_others "$1" || die "release $1 is deployed and verified, but others are left: run this again"
    rm -f "$STATE/pending"
    say "release $1 is deployed and verified"
}

on_exit() {
    local code=$?
    set +e               # one failure more must not end the way back,
    trap '' INT TERM HUP # nor a second Ctrl-C
    trap - EXIT
    hang_up
    if [[ -n $switching ]]; then
        # After a SIGHUP the terminal is gone, and nuctl too would fail to write there.
        [[ $code != 129 ]] || exec >>"$STATE/going-back.log" 2>&1
        if [[ -n $current && $current != "$switching" ]]; then
            say "going back to release $current; this cannot be interrupted"
            if activate "$current" && delete_others "$current"; then
                rm -f "$STATE/pending"
                say "release $current is deployed again; $switching was given up"
            else
                say "release $current is not back: put right what is said above, then ./deploy.sh rollback"
            fi
        else
            say "there is no release to go back to: deleting what was deployed"
            delete_functions "$(functions_of "$switching")" && rm -f "$STATE/pending"
        fi
        code=1
    fi
    exit "$code"
}

# Folders and images of all releases but the current and the one before.
forget_old_releases() {
    local path kept tags tag
    kept=" $current $previous "
    tags=$(images_of_releases)
    for path in "$STATE"/releases/*; do
        [[ $kept == *" ${path##*/} "* ]] || rm -rf "$path"
    done
    for tag in $tags; do
        images_of_releases | grep -qxF "$tag" || delete_image "$tag"
    done
}

images_of_releases() { cat "$STATE"/releases/*/image "$STATE"/releases/*/code 2>/dev/null | sort -u; }

delete_image() {
    [[ -n $dry_run ]] || docker image inspect "$1" >/dev/null 2>&1 || return 0
    call docker rmi "$1" >/dev/null || say "note: image $1 is still in use and stays"
}

# ---------------------------------------------------------------------------------------------- commands

push_image() {
    [[ $platform == local ]] || call docker push "$image" >&2
}

deploy() {
    new_release
    describe_release
    write_requests
    local extra=()
    [[ -z $min_replicas ]] || extra+=(--min-replicas "$min_replicas")
    [[ -z $max_replicas ]] || extra+=(--max-replicas "$max_replicas")
    ((${#extra[@]} == 0)) || printf '%s\n' "${extra[@]}" >"$folder/options"
    build_image
    work_out_answers
    put_iterations_first
    push_image
    local projects
    projects=$(call nuctl get project cvat "${where[@]}" 2>/dev/null) || projects='' # there may be none
    grep -qw cvat <<<"$projects" || call nuctl create project cvat "${where[@]}" >&2
    switch_to "$release"
    finish
}

deploy_weights() {
    call docker image inspect "$current_code" >/dev/null ||
        die "image $current_code, which weights are put on, is gone (docker image prune?):" \
            "run ./deploy.sh cpu or gpu again"
    new_release
    local from=$STATE/releases/$current
    cp -r "$from/functions" "$from/settings" "$from/names" "$folder"
    [[ ! -f $from/options ]] || cp "$from/options" "$folder"
    write_requests
    build_weights
    work_out_answers
    put_iterations_first
    push_image
    switch_to "$release"
    finish
}

finish() {
    [[ -z $dry_run ]] || return 0
    read_links
    forget_old_releases
    status
    printf '\nLabels for a CVAT task (tab Raw of its label editor; "From model" makes the same by clicks):\n'
    labels
}

# After an interruption to the current release, else to the one before: a second rollback undoes the first.
rollback() {
    if [[ -n $pending ]]; then
        { activate "$current" && delete_others "$current"; } ||
            die "release $current is not back: put right what is said above, then once more"
        [[ -n $dry_run ]] || rm -f "$STATE/pending"
    else
        [[ -n $previous ]] || die "there is no earlier release to go back to"
        switch_to "$previous"
    fi
    [[ -z $dry_run ]] || return 0
    read_links
    status
}

status() {
    local name
    [[ -n $current$pending ]] || die "nothing is deployed on $platform in namespace $namespace"
    [[ -z $current ]] || tell 'release %s\n' "$current"
    for name in $(functions_of "$current"); do
        tell '%-26s' "$(<"$STATE/releases/$current/functions/$name.title")"
        if reach "$name" && ask --max-time 10 --output "$STATE/answer" "$url"; then
            [[ -n $dry_run ]] || printf '%s  weights %s\n' "$(address_of "$name")" \
                "$(sed 's/.*"weights": *"\([^"]*\)".*/\1/' "$STATE/answer")"
        else
            tell 'does not answer: nuctl get function %s %s\n' "$name" "${where[*]}"
        fi
    done
    [[ -z $previous ]] || tell 'rollback goes to release %s\n' "$previous"
    [[ -z $pending ]] || tell 'deploying %s was interrupted: run it again, or ./deploy.sh rollback\n' "$pending"
}

# Like printf, but silent in a dry run, which prints commands alone.
tell() {
    # shellcheck disable=SC2059
    [[ -n $dry_run ]] || printf "$@"
}

# CVAT's label editor wants `mutable` and a default as well.
labels() {
    awk '/^    spec: \|/ { inside = 1; next } inside && !/^      / { exit } inside' \
        "$STATE/releases/$current/functions/$(functions_of "$current" | head -n 1).yaml" |
        sed 's/^      //; s/"values": \["\([^"]*\)"/"mutable": false, "default_value": "\1", &/'
}

remove() {
    local tag
    delete_functions "$(functions_of_all)" || die "not all is deleted: put right what is said above, then once more"
    for tag in $(images_of_releases); do
        delete_image "$tag"
    done
    [[ -n $dry_run ]] || rm -rf "$STATE"
}

# ---------------------------------------------------------------------------------------------- main

exec 3>&1 # where dry runs print, whatever becomes of a command's output
switching=''
parse_arguments "$@"
STATE=$ROOT/out/deploy/$platform-$namespace
mkdir -p "$STATE/releases"
exec 9>"$ROOT/out/deploy/lock"
[[ $command == status ]] || flock --nonblock 9 || die "another deploy.sh is at work in this folder"
read_links
device=$command
[[ -z $dry_run || -n $current || ! $command =~ ^(weights|status)$ ]] || suppose_release
if [[ $command == weights || $command == rollback ]]; then
    [[ -n $current ]] || die "nothing is deployed on $platform in namespace $namespace: ./deploy.sh cpu or gpu first"
    device=$(<"$STATE/releases/$current/device")
    current_code=$(<"$STATE/releases/$current/code")
fi
trap on_exit EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP
check_needs
case $command in
    cpu | gpu) deploy ;;
    weights) deploy_weights ;;
    *) "$command" ;;
esac
