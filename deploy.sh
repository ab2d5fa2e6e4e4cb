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
SAMPLE_CLICK='[560.0, 560.0]' # on the spall of the sample photo
TITLE_MAX=24                  # characters of a name that CVAT's model list shows
NAME_MAX=16                   # those of --name: "NAME defects" must fit
READY_SECONDS=${READY_SECONDS:-300}
ANSWER_SECONDS=${ANSWER_SECONDS:-300} # a CPU may take minutes for the sample with many climbing steps
DRIVER=580                            # NVIDIA's, the first for CUDA 13, which PyTorch brings along

usage() {
    cat <<'EOF'
usage: ./deploy.sh cpu|gpu [options]   build the image, deploy the function and its presets, verify them
       ./deploy.sh weights DIR         verify a new weights folder and deploy it in place of the present weights
       ./deploy.sh rollback            go back to the release before
       ./deploy.sh status              what is deployed, where, with which weights
       ./deploy.sh remove              delete the functions, their images and the record of releases
       ./deploy.sh save FILE           write image, functions and weights of the current release to one file
       ./deploy.sh load FILE           deploy and verify such a file on a machine without internet

Every run of cpu or gpu deploys what its command line says, and deletes functions of the last run that it does not
name. If a deployed function does not answer as its weights must, everything goes back to the release before. A defect of
the weights that function.yaml has no label for gets one in the files that are deployed; add it to your tasks in CVAT, too.

options of cpu and gpu:
  --weights DIR         these weights instead of ./weights
  --iterations LIST     one more entry in CVAT's model list for each number of climbing steps, e.g. 0,2,8
  --presets FILE        further entries, one a line: NAME | key=value ..., NAME as CVAT shows it (24 characters),
                        keys as in README.md, "Settings", e.g.
                          AdvCAM fine cracks | defects=crack iterations=8 cam_threshold=0.2

options of cpu, gpu and load, for Kubernetes:
  --registry URL        where the image is pushed to and pulled from, e.g. registry.example.org/cvat
  --min-replicas N      least and greatest number of copies of each function
  --max-replicas N

options of every command:
  --name NAME           a deployment of its own, beside the one without a name and others: entries of CVAT's model list,
                        releases, rollback and removal of its own. "AdvCAM" in its entries becomes NAME, e.g.
                          ./deploy.sh cpu --name bridge-a --weights out/next      gives "bridge-a defects"
                        status without --name lists all deployments; the other commands without it leave these alone
  --platform local|kube Docker on this machine (the default), or the cluster of kubectl's current context
  --namespace NAME      where CVAT looks for functions (default: nuclio)
  --cvat DIR            CVAT's repository, for the version of its Nuclio; otherwise that of the running one
  --dry-run             print every docker, nuctl, kubectl and curl command, one a line, and run none; function files
                        are written to be read. VERSION, PORT, REGISTRY and HELPER stand for what only a real run knows.
  --help

With ADVCAM_CVAT_URL and ADVCAM_CVAT_TOKEN in the environment the functions read T and the labels' types from the CVAT
task that is being annotated, and a new deployment is checked with defectcam doctor (docs/operate.md). The token is a
personal access token of a service account, a user of CVAT that is there for the functions alone; for CVAT 2.15, which
has none, the key that POST /api/auth/login gives that user (docs/deploy.md).
Do not sign in to the web page as that user: signing out there deletes the key.
EOF
}

# Progress and results; a dry run, which prints commands alone, has none.
say() { [[ -n $dry_run ]] || printf '%s\n' "$*" >&2 || true; } # a closed terminal must not end the way back
# shellcheck disable=SC2059
tell() { [[ -n $dry_run ]] || printf "$@"; }

warn() { printf 'deploy.sh: %s\n' "$@" >&2; }
die() {
    warn "$@"
    exit 1
}

# lack REASON ...: the end of a run, but not of a dry run, which only says that something is lacking.
lack() {
    [[ -n $dry_run ]] || die "$@"
    warn "$@" "without --dry-run this is an error"
}

# Run a command, or only print it, with the condition $only_if that a real run checks first.
call() {
    if [[ -n $dry_run ]]; then
        local line
        printf -v line '%q ' "$@"
        printf '%s\n' "${line% }${only_if:+ # only if $only_if}" >&3
    else
        "$@"
    fi
}

# ---------------------------------------------------------------------------------------------- command line

parse_arguments() {
    command='' argument='' dry_run='' platform=local namespace=nuclio registry='' cvat='' presets='' iterations=''
    min_replicas='' max_replicas='' deployment='' weights=''
    local option
    while (($#)); do
        case $1 in
            --help | -h)
                usage
                exit
                ;;
            --dry-run) dry_run=yes ;;
            --platform | --namespace | --name | --registry | --cvat | \
                --weights | --iterations | --presets | --min-replicas | --max-replicas)
                [[ $# -gt 1 && -n $2 && $2 != -* ]] || die "$1 needs a value; ./deploy.sh --help"
                option=${1#--}
                [[ $option != name ]] || option=deployment # functions have names, too
                printf -v "${option//-/_}" '%s' "$2"
                shift
                ;;
            -*) die "unknown option '$1'; ./deploy.sh --help" ;;
            *)
                if [[ $command =~ ^(weights|save|load)$ && -z $argument ]]; then # whatever the path is called
                    argument=$1
                    shift
                    continue
                fi
                [[ $1 =~ ^(cpu|gpu|weights|rollback|status|remove|save|load)$ ]] ||
                    die "unknown command '$1'; ./deploy.sh --help"
                [[ -z $command ]] || die "two commands, '$command' and '$1'; ./deploy.sh --help"
                command=$1
                ;;
        esac
        shift
    done
    [[ -n $command ]] || { usage >&2 && exit 2; }
    [[ $platform == local || $platform == kube ]] || die "--platform is '$platform', but must be local or kube"
    [[ $namespace =~ ^[a-z0-9]([a-z0-9-]*[a-z0-9])?$ ]] || die "--namespace is '$namespace', no Kubernetes name"
    [[ $deployment =~ ^([a-z0-9]+(-[a-z0-9]+)*)?$ && ${#deployment} -le $NAME_MAX ]] ||
        die "--name is '$deployment', but must be 1 to $NAME_MAX lower-case letters, digits and single hyphens, as in bridge-a"
    for option in min_replicas max_replicas; do
        [[ ${!option} =~ ^[0-9]*$ ]] || die "--${option/_/-} is '${!option}', but must be a number"
    done
    [[ $platform == kube || -z $min_replicas$max_replicas$registry ]] ||
        die "--registry and replicas need --platform kube: Docker runs one copy of an image on this machine"
    [[ $command =~ ^(cpu|gpu)$ || -z $iterations$presets$weights ]] ||
        die "--iterations, --presets and --weights belong to cpu and gpu: '$command' keeps what is deployed or saved"
    if [[ $command =~ ^(cpu|gpu|load)$ ]]; then
        [[ $platform == local || -n $registry ]] ||
            die "--platform kube needs --registry: the cluster pulls the image from there"
        [[ ${ADVCAM_CVAT_URL:+set} == "${ADVCAM_CVAT_TOKEN:+set}" ]] ||
            die "only one of ADVCAM_CVAT_URL and ADVCAM_CVAT_TOKEN is set: set both, or neither"
    else
        [[ -z $min_replicas$max_replicas$registry ]] ||
            die "--registry and replicas belong to cpu, gpu and load: '$command' keeps what is deployed"
    fi
    [[ ! $command =~ ^(weights|save|load)$ || -n $argument ]] || die "$command needs a path; ./deploy.sh --help"
    case $command in
        weights) weights=$argument ;;
        save)
            [[ ! -e $argument ]] || die "'$argument' is there already: name another file, or delete it"
            [[ -w $(dirname "$argument") ]] || die "cannot write '$argument': make its folder, or name another one"
            ;;
        load) [[ -f $argument && -r $argument ]] || die "cannot read '$argument': name a file of ./deploy.sh save" ;;
    esac
    weights=${weights:-$ROOT/weights}
    if [[ $command =~ ^(cpu|gpu|weights)$ ]]; then
        [[ -f $weights/manifest.json ]] || die "no weights in '$weights': it has no manifest.json"
        compgen -G "$weights/*.safetensors" >/dev/null || die "no weights in '$weights': it has no *.safetensors"
    fi
    where=(--platform "$platform" --namespace "$namespace")
}

# ---------------------------------------------------------------------------------------------- what is needed

check_needs() {
    local missing=() tools=(docker nuctl curl) tool
    [[ $platform == local ]] || tools+=(kubectl)
    for tool in "${tools[@]}"; do
        command -v "$tool" >/dev/null || missing+=("$tool is not installed, or not in PATH")
    done
    ((${#missing[@]} == 0)) || lack "${missing[@]}"
    call docker info --format '{{.ServerVersion}}' >/dev/null ||
        die "docker does not answer: start its daemon, or join the group that may use it"
    [[ $command =~ ^(cpu|gpu|weights|load)$ ]] || return 0
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
    [[ $images =~ nuclio/dashboard:([0-9]+\.[0-9]+\.[0-9]+) || -n $dry_run ]] ||
        die "no Nuclio dashboard is running: start CVAT with its serverless compose file, or give --cvat DIR"
    nuclio_version=${BASH_REMATCH[1]:-VERSION}
    [[ -z $dry_run ]] || return 0
    [[ $client =~ Label:\ ([0-9.]+) ]] || die "nuctl does not tell its version: $client"
    [[ ${BASH_REMATCH[1]} == "$nuclio_version" ]] ||
        die "nuctl is ${BASH_REMATCH[1]}, but CVAT runs Nuclio $nuclio_version: install nuctl $nuclio_version"
    [[ $command != load || $saved_nuclio == "$nuclio_version" ]] ||
        die "'$argument' has Nuclio $saved_nuclio in its image, but CVAT runs Nuclio $nuclio_version here:" \
            "save it on a machine whose CVAT runs Nuclio $nuclio_version"
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
    [[ $command != load ]] || needed=$((2 * $(stat -L -c %s "$argument") / 1000000000 + 1)) # docker unpacks it first
    folder=$(call docker info --format '{{.DockerRootDir}}')
    [[ -z $dry_run && -d $folder ]] || return 0 # without it the daemon is on another machine
    free=$(df -Pk "$folder" | awk 'NR == 2 { print int($4 / 1e6) }')
    ((free >= needed)) ||
        die "$folder has $free GB free, but $needed GB are needed: docker system prune, or a larger disk"
}

# ---------------------------------------------------------------------------------------------- a release

# use_deployment NAME: set where its releases are and which there are. The one that has no name has the name ''.
use_deployment() {
    deployment=$1
    STATE=$ROOT/out/deploy/$platform-$namespace${1:+.$1}
    current=$(release_of current) previous=$(release_of previous) pending=$(release_of pending)
    its_name=${1:+ --name $1} # for commands that the user is told
    nothing="nothing is deployed on $platform in namespace $namespace${1:+ with --name $1}"
}

named_deployments() { # those beside the one without a name
    local path
    [[ -z $deployment ]] || return 0
    for path in "$STATE".*; do
        [[ ! -L $path/current && ! -L $path/pending ]] || printf '%s\n' "${path##*.}"
    done
}

release_of() { # the name of the release that a link points to; nothing where there is no link
    local path
    path=$(readlink "$STATE/$1" 2>/dev/null) || return 0
    printf '%s' "${path##*/}"
}

point() { # point LINK RELEASE: in one step, so that no interruption leaves half a link
    [[ -z $dry_run ]] || return 0
    ln -sfn "releases/$2" "$STATE/$1.new"
    mv -T "$STATE/$1.new" "$STATE/$1"
}

settle() { # what was pending is deployed, or gone
    pending=''
    [[ -n $dry_run ]] || rm -f "$STATE/pending"
}

new_release() { # new_release [NAME OF A DRY RUN]: sets $release and $folder
    release=${1:-dry-run}
    [[ -z $dry_run ]] || rm -rf "$STATE/releases/$release"
    until [[ -n $dry_run ]] || { release=$(date -u +%Y%m%d-%H%M%S) && [[ ! -e $STATE/releases/$release ]]; }; do
        sleep 0.2 # a run of this very second was cut off: names are times, the next second has its own
    done
    folder=$STATE/releases/$release
    mkdir -p "$folder"/{functions,settings,answers} || die "cannot write to $STATE/releases"
}

# inherit RELEASE_FOLDER: the new release gets all of it but what image and weights decide
inherit() {
    local part
    for part in names functions settings options nuclio detector.json interactor.json; do
        [[ ! -e $1/$part ]] || cp -r "$1/$part" "$folder"
    done
}

write_options() { # further options of nuctl deploy
    local options=(${min_replicas:+--min-replicas "$min_replicas"} ${max_replicas:+--max-replicas "$max_replicas"})
    ((${#options[@]} == 0)) || printf '%s\n' "${options[@]}" >"$folder/options"
}

functions_of() { # names of a release's functions, the default first
    [[ -z $1 ]] || cat "$STATE/releases/$1/names"
}

# add_function TEMPLATE NAME TITLE [KEY=VALUE ...]: NAME and TITLE may be empty for the template's own.
add_function() {
    local template=$1 name=$2 title=$3
    shift 3
    name=${name:-$(sed -n 's/^  name: *\([^ #]*\).*/\1/p' "$template")}
    title=${title:-$(sed -n 's/^    name: *\([^#]*[^ #]\).*/\1/p' "$template")}
    # No preset of another deployment is called so: there are never two hyphens in a row.
    [[ -z $deployment ]] || name=$name--$deployment title="$deployment ${title#AdvCAM }"
    ((${#title} <= TITLE_MAX)) ||
        die "'$title' has ${#title} characters, but CVAT shows $TITLE_MAX: shorten it${deployment:+, or --name}"
    ! grep -qxF "$name" "$folder/names" 2>/dev/null || die "two entries named '$title' ($name): rename one"
    (($# == 0)) || printf '%s\n' "$@" >"$folder/settings/$name"
    write_function "$template" "$name" "$title"
    printf '%s\n' "$title" >"$folder/functions/$name.title"
    printf '%s\n' "$name" >>"$folder/names"
}

# write_function FILE NAME TITLE: the release's file of function NAME, made from FILE, a template or this very file.
#
# nuctl could override all but two things: it cuts an annotation at its second "=", and it builds again, whatever
# --run-image says, as long as the file has spec.build. Hence a file for each function.
write_function() {
    local cvat_of=file file=$folder/functions/$2.yaml
    if [[ $command == save ]]; then # a token stays on its machine; a reference to a Secret may go
        ! grep -q '^ADVCAM_CVAT_TOKEN=' <(file_variables "$1") || cvat_of=nothing
    else
        [[ -z ${ADVCAM_CVAT_TOKEN:+set} ]] || cvat_of=environment
        # An entry with a T of its own is chosen for that T: the task's label must not replace it. A click has no T.
        if is_interactor "$1" || grep -qs '^ADVCAM_ITERATIONS=' "$folder/settings/$2"; then cvat_of=nothing; fi
    fi
    # The token is read by awk alone: other users can see a program's arguments, and `bash -x` prints bash's values.
    LC_ALL=C awk -v name="$2" -v title="$3" -v cvat_of="$cvat_of" '
        BEGIN {
            count = cvat_of == "environment" ? split("ADVCAM_CVAT_URL ADVCAM_CVAT_TOKEN", variables, " ") : 0
            for (i = 1; i <= count; i++) {
                value = ENVIRON[variables[i]]
                gsub(/^[ \t\r\n]+|[ \t\r\n]+$/, "", value)
                if (value !~ /^[!-~]+$/ || value ~ /["\047\\]/) {
                    print "deploy.sh: " variables[i] " has a blank, a quote or a control character in it" >"/dev/stderr"
                    exit 1
                }
                entries = entries "    - name: " variables[i] "\n      value: \"" value "\"\n"
            }
        }
        /^(  )?[a-z]/ { block = $1; skipping = block == "build:" }
        block == "env:" && /^    - / {
            skipping = cvat_of != "file" && /name: *["\047]?ADVCAM_CVAT_(URL|TOKEN)(["\047 ,#]|$)/
        }
        skipping { next }
        /^  name:/ { print "  name: " name; next }
        block == "annotations:" && /^    name:/ { print "    name: \"" title "\""; next }
        { print }
        /^  env:/ { printf "%s", entries }' "$1" >"$file.new" || exit 1
    mv "$file.new" "$file"
}

rewrite_function() { write_function "$folder/functions/$1.yaml" "$1" "$(<"$folder/functions/$1.title")"; }

is_interactor() { grep -q '^ *type: *interactor' "$1"; }

# add_preset TITLE KEY=VALUE ...: one more entry in CVAT's model list, keys as in a request.
add_preset() {
    local title=$1 name setting settings=()
    shift
    [[ $title =~ ^[A-Za-z0-9][A-Za-z0-9\ =.,+-]*$ ]] ||
        die "a preset's name is '$title', but may have letters, digits, spaces and =.,+- only"
    (($# > 0)) || die "preset '$title' sets nothing: NAME | key=value ..."
    for setting in "$@"; do
        [[ ${setting%%=*} =~ ^(iterations|threshold|cam_threshold|defects|shape|tolerance_px|hole_share|max_proposals)$ &&
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
            [[ $count =~ ^[0-9]{1,2}$ && $((10#$count)) -le 50 ]] ||
                die "--iterations has '$count', but may have numbers from 0 to 50, as in 0,2,8"
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
    add_labels "$weights/manifest.json"
}

# JSON for awk, which is there where no Python is. read_json(TEXT) sets, by the path of keys and places from 1 on, joined by
# SUBSEP: first[PATH] and last[PATH], where a value's text begins and ends, and paths[1..count]. text_of(JSON) is the text
# that a JSON string between its quotes stands for, in UTF-8; json_of(TEXT) the other way.
# shellcheck disable=SC2016
JSON='
function read_json(s, at, length_s, c, depth, path, end, key, place, list, inside, wants_key) {
    split("", first); split("", last); count = 0
    length_s = length(s)
    for (at = 1; at <= length_s; at++) {
        c = substr(s, at, 1)
        if (c == ",") place[depth]++
        if (index(" \t\r\n,:", c)) continue
        if (c == "}" || c == "]") {
            last[inside[depth]] = at
            wants_key[--depth] = 1
            continue
        }
        end = at
        if (c == "\"") {
            for (end++; end <= length_s && substr(s, end, 1) != "\""; end++) if (substr(s, end, 1) == "\\") end++
            if (depth && !list[depth] && wants_key[depth]) {
                key[depth] = text_of(substr(s, at + 1, end - at - 1))
                wants_key[depth] = 0
                at = end
                continue
            }
        } else if (!index("{[", c)) {
            while (end < length_s && substr(s, end + 1, 1) !~ /[] \t\r\n,}]/) end++
        }
        path = depth > 1 ? inside[depth] SUBSEP : ""
        if (depth) path = path (list[depth] ? place[depth] : key[depth])
        paths[++count] = path
        first[path] = at
        last[path] = end
        if (index("{[", c)) {
            inside[++depth] = path
            list[depth] = c == "["
            place[depth] = 1
        }
        wants_key[depth] = 1
        at = end
    }
}
function text_of(json, at, c, code, out) {
    for (at = 1; at <= length(json); at++) {
        c = substr(json, at, 1)
        if (c == "\\") {
            c = substr(json, ++at, 1)
            if (c == "u") {
                code = hexadecimal(substr(json, at + 1, 4))
                at += 4
                if (code >= 55296 && code < 56320 && substr(json, at + 1, 2) == "\\u") { # the first half of a pair
                    code = 65536 + (code - 55296) * 1024 + hexadecimal(substr(json, at + 3, 4)) - 56320
                    at += 6
                }
                c = utf8(code)
            } else if (index("bfnrt", c)) c = "\n"
        }
        out = out c
    }
    return out
}
function hexadecimal(digits, i, value) {
    for (i = 1; i <= length(digits); i++) value = 16 * value + index("0123456789abcdef", tolower(substr(digits, i, 1))) - 1
    return value
}
function utf8(code) {
    if (code < 32) return "\n" # every control character: no name may have one
    if (code < 128) return sprintf("%c", code)
    if (code < 2048) return sprintf("%c%c", 192 + int(code / 64), 128 + code % 64)
    if (code < 65536) return sprintf("%c%c%c", 224 + int(code / 4096), 128 + int(code / 64) % 64, 128 + code % 64)
    return sprintf("%c", 240 + int(code / 262144)) sprintf("%c%c%c", 128 + int(code / 4096) % 64, 128 + int(code / 64) % 64, \
        128 + code % 64)
}
function json_of(text) {
    gsub(/\\/, "\\\\&", text)
    gsub(/"/, "\\\\&", text)
    return text
}
function string_at(s, path) { return text_of(substr(s, first[path] + 1, last[path] - first[path] - 1)) }
function file_text(path, s, separator) {
    separator = RS
    RS = "\001"
    getline s <path
    close(path)
    RS = separator
    return s
}'

# What comes before and after a function file's labels is printed as it is, and the labels are given to change_labels.
# shellcheck disable=SC2016
ITS_LABELS='
/^    spec: *\|/ { inside_spec = 1; print; next }
inside_spec && /^(      |[ \t]*$)/ { spec = spec $0 "\n"; next }
inside_spec { printf "%s", change_labels(spec); inside_spec = 0; spec = "" }
{ print }
END { if (inside_spec) printf "%s", change_labels(spec) }'

# change_labels AWK_PROGRAM: whose function change_labels changes those of every function of the release
change_labels() {
    local name file
    for name in $(functions_of "$release"); do
        file=$folder/functions/$name.yaml
        LC_ALL=C awk "$JSON$ITS_LABELS$1" "$file" >"$file.new" || exit 1
        mv "$file.new" "$file"
    done
}

# defects_of MANIFEST: the names of its defects, one a line, each of which CVAT must be able to take for a label.
# defectcam/cvat_labels.py has the same rules; a test holds the two together.
defects_of() {
    MANIFEST=$1 LC_ALL=C awk "$JSON"'
        function refuse(name, why) {
            printf "deploy.sh: %s: the defect\047s name \047%s\047 %s: give it another name (defectcam calibrate " \
                "--defect NAME)\n", ENVIRON["MANIFEST"], name, why >"/dev/stderr"
            failed = 1
        }
        BEGIN {
            read_json(file_text(ENVIRON["MANIFEST"]))
            for (i = 1; i <= count; i++) {
                if (split(paths[i], keys, SUBSEP) != 2 || keys[1] != "defects") continue
                name = keys[2]
                characters = name
                gsub(/[\200-\277]/, "", characters) # of a character of several bytes the first one counts
                if (name == "") refuse(name, "is empty")
                else if (name == "unprocessed" || name == "notice")
                    refuse(name, "is the tag \047" name "\047 of the function")
                else if (name ~ /^ | $/) refuse(name, "begins or ends with a blank")
                else if (length(characters) > 64) refuse(name, "has " length(characters) " characters, but CVAT takes 64")
                else if (name ~ /[\001-\037\177]|\302[\200-\237]|\342\200[\250\251]/)
                    refuse(name, "has a control character or a line break")
                else print name
            }
            exit failed
        }' </dev/null
}

# add_labels MANIFEST: the release's function files get a label for each defect of a manifest that they lack: as their
# first label, but for name and colour, before the tags.
add_labels() {
    local defects
    [[ -f $1 ]] || return 0 # nothing can be built then
    defects=$(defects_of "$1") || exit 1
    DEFECTS=$defects TOLD=$folder/functions/$(functions_of "$release" | head -n 1).yaml change_labels '
        BEGIN {
            names = split(ENVIRON["DEFECTS"], defects, "\n")
            colours = split("#00dc78 #ff00ff #00e5ff #b4ff00 #aa5aff #ff7800", colour, " ")
        }
        function change_labels(spec, i) {
            for (i = 1; i <= names; i++) spec = with_label(spec, defects[i])
            return spec
        }
        function with_label(spec, defect, labels, like, tag, i, made, own) {
            read_json(spec)
            for (labels = 0; (labels + 1) in first; labels++) {
                if (string_at(spec, labels + 1 SUBSEP "name") == defect) return spec
                if (!like && string_at(spec, labels + 1 SUBSEP "type") == "polygon") like = labels + 1
                if (!tag && string_at(spec, labels + 1 SUBSEP "type") == "tag") tag = labels + 1
            }
            if (!like) {
                printf "deploy.sh: %s has no label of type polygon; the label of \047%s\047 is made like that: add one, " \
                    "such as crack\n", FILENAME, defect >"/dev/stderr"
                exit 1
            }
            for (i = 1; i <= colours && index(spec, "\"" colour[i] "\""); i++) continue
            own = colour[i <= colours ? i : labels % colours + 1]
            made = substr(spec, first[like], last[like] - first[like] + 1)
            sub(/"color": *"[^"]*", */, "", made)
            read_json(made)
            made = substr(made, 1, first["name"]) json_of(defect) "\", \"color\": \"" own substr(made, last["name"])
            read_json(spec)
            if (FILENAME == ENVIRON["TOLD"]) {
                printf "note: the weights have a defect \047%s\047; add the label \047%s\047 to your task in CVAT " \
                    "(docs/annotate.md, \"Labels\"), which drops its proposals otherwise\n", defect, defect >"/dev/stderr"
            }
            if (tag) return substr(spec, 1, first[tag] - 1) made ",\n        " substr(spec, first[tag])
            return substr(spec, 1, last[labels]) ",\n        " made substr(spec, last[labels] + 1)
        }'
}

# suppose_release REASON: end a real run, since there is no release; a dry run goes on as if cpu had been run.
suppose_release() {
    lack "$1"
    warn "the commands below are those after ./deploy.sh cpu$its_name"
    [[ $platform == local ]] || registry=REGISTRY
    device=cpu
    new_release RELEASE
    describe_release
    name_image
    write_requests
    current=RELEASE previous=RELEASE
}

build_code() {
    local arguments=(--build-arg "NUCLIO_VERSION=$nuclio_version" --build-arg "DEVICE=$device")
    [[ $device != cpu ]] || openvino_suffices || {
        say "not all of $weights can be run by OpenVINO: the image gets PyTorch"
        arguments+=(--build-arg ENGINE=torch)
    }
    name_image
    printf '%s\n' "$nuclio_version" >"$folder/nuclio"
    say "building $code"
    call docker build "${arguments[@]}" --target code --tag "$code" "$ROOT" >&2
}

# Whether OpenVINO can run all of the weights: every defect has a graph, and none climbs as the paper does.
openvino_suffices() {
    (($(in_manifest '"file": *"') == $(in_manifest '"graph": *"[^"]') && $(in_manifest '"form": *"paper"') == 0))
}

in_manifest() { # how often the weights' manifest.json has something
    { grep -o "$1" "$weights/manifest.json" || true; } | wc -l
}

# The weights on the code. They are copied into the release first: what is verified is what is deployed.
build_weights() {
    mkdir "$folder/weights"
    cp "$weights"/manifest.json "$weights"/*.safetensors "$folder/weights"
    if compgen -G "$weights/*.onnx" >/dev/null; then cp "$weights"/*.onnx "$folder/weights"; fi
    chmod -R a+rX "$folder/weights" # the function does not run as root
    printf 'FROM %s\nCOPY . weights/\n' "$code" >"$folder/Dockerfile"
    say "building $image with the weights of $weights"
    call docker build --tag "$image" --file "$folder/Dockerfile" "$folder/weights" >&2
}

name_image() { # name_image [CODE]: written down before anything is built, so that it can be deleted later
    local repository=${registry:+${registry%/}/}$IMAGE tag=$device-$release${deployment:+-$deployment}
    code=${1:-$repository:code-$tag}
    image=${code%:*}:$tag
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
        if shape["label"] == "notice":  # T of a task cannot be had, the weights are right all the same
            print("note:", shape["attributes"][0]["value"], file=sys.stderr)
            continue
        region = found.setdefault(shape["label"], Image.new("1", (side, side)))
        if "mask" in shape:
            *bits, left, top, right, bottom = map(int, shape["mask"])
            bits = Image.fromarray(np.uint8(bits).reshape(bottom - top + 1, -1) * 255)
            region.paste(1, (left, top), bits.convert("1"))
        elif "points" in shape:
            ImageDraw.Draw(region).polygon(shape["points"], fill=1)
    return {label: np.array(region) for label, region in found.items()}
expected, expected_answer, found, found_answer = map(json.loads, data.splitlines())
shapes = [shape for answer in (expected_answer, found_answer) if isinstance(answer, list) for shape in answer]
ends = [number for shape in shapes for number in shape.get("points", []) + shape.get("mask", [])[-4:]]
side = int(max(ends, default=0)) + 2
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
    local kind=detector
    ! is_interactor "$STATE/releases/$1/functions/$2.yaml" || kind=interactor
    printf '%s' "$STATE/releases/$1/$kind.json"
}

# What a function file's env sets of the model, KEY=VALUE a line.
file_variables() {
    awk '
        function flush() { if (name ~ /^ADVCAM_/ && value != "") print name "=" value; name = value = "" }
        /^  env:/ { inside = 1; next }
        /^  [a-z]/ || /^[^ #]/ { inside = 0 }
        !inside || /^ *#/ { next }
        /^ *- / { flush() }
        match($0, /name: *["\047]?[A-Z_]+/) { name = substr($0, RSTART, RLENGTH); sub(/name: *["\047]?/, "", name) }
        match($0, /value: */) {
            value = substr($0, RSTART + RLENGTH)
            if (value ~ /^["\047]/) value = substr(value, 2, index(substr(value, 2), substr(value, 1, 1)) - 1)
            else if (/{/) sub(/ *[,}].*/, "", value)
            else sub(/ +#.*| +$/, "", value)
        }
        END { flush() }' "$1"
}

# Those for a container that is run alone: not what names CVAT or a folder that is mounted when the function is deployed,
# and no device where the function runs on another machine.
file_settings() {
    local others='LOG_DIR|WEIGHTS|CVAT_.*'
    [[ $platform == local ]] || others+='|DEVICE'
    file_variables "$1" | grep -vE "^ADVCAM_($others)=" || true
}

# env_options: sets $options to --env KEY=VALUE ..., which docker and nuctl share, for the lines KEY=VALUE on stdin.
env_options() {
    local setting
    options=()
    while IFS= read -r setting; do
        options+=(--env "$setting")
    done
}

# What every function must answer, from the image itself. It proves weights and settings before anything is touched.
work_out_answers() {
    local name options gpus=() advice=''
    if [[ $device == gpu && $platform == local ]]; then
        gpus=(--gpus all --env ADVCAM_DEVICE=cuda) # without it a GPU that PyTorch cannot use would be passed over
        advice="; a GPU needs NVIDIA's driver $DRIVER or newer: nvidia-smi"
    fi
    for name in $(functions_of "$release"); do
        say "working out what $name must answer"
        # Of a variable given twice the last one counts: the file's, then the preset's.
        env_options < <(file_settings "$folder/functions/$name.yaml" && cat "$folder/settings/$name" 2>/dev/null)
        run_program "$ANSWER_PROGRAM" ${gpus[@]+"${gpus[@]}"} ${options[@]+"${options[@]}"} \
            "$image" <"$(request_for "$release" "$name")" >"$folder/answers/$name" ||
            die "$name cannot be deployed: its image, weights or settings do not work (see above)$advice"
        ! grep -q '"unprocessed"' <(tail -n 1 "$folder/answers/$name") ||
            die "$name cannot process $SAMPLE: $(tail -n 1 "$folder/answers/$name")"
    done
}

# The T that these weights answer with comes first in its label's select: "From model" makes the first one the default.
put_iterations_first() {
    [[ -z $dry_run ]] || return 0 # nothing was answered
    SAID=$folder/answers/$(functions_of "$release" | head -n 1) change_labels '
        BEGIN {
            answer = file_text(ENVIRON["SAID"])
            sub(/\n.*/, "", answer)
            read_json(answer)
            for (i = 1; i <= count; i++) {
                if (split(paths[i], keys, SUBSEP) == 3 && keys[1] == "defaults" && keys[3] == "iterations")
                    steps[keys[2]] = substr(answer, first[paths[i]], last[paths[i]] - first[paths[i]] + 1)
            }
        }
        function change_labels(spec, label, defect) {
            read_json(spec)
            for (label = 1; label in first; label++) {
                defect = string_at(spec, label SUBSEP "name")
                if (defect in steps) spec = with_first(spec, label, steps[defect])
                read_json(spec)
            }
            return spec
        }
        function with_first(spec, label, steps, path, i, values) {
            for (i = 1; (path = label SUBSEP "attributes" SUBSEP i) in first; i++) {
                if (string_at(spec, path SUBSEP "name") == "iterations") break
            }
            path = path SUBSEP "values"
            if (!(path in first) || string_at(spec, path SUBSEP 1) == steps) return spec
            values = "\"" steps "\""
            for (i = 1; (path SUBSEP i) in first; i++) {
                if (string_at(spec, path SUBSEP i) != steps) values = values ", \"" string_at(spec, path SUBSEP i) "\""
            }
            return substr(spec, 1, first[path]) values substr(spec, last[path])
        }'
}

# ---------------------------------------------------------------------------------------------- deploying

ask() { call curl --noproxy '*' --silent --fail "$@"; } # a function: on this machine, whatever proxy the network has

# reach NAME: sets $url to where this machine reaches a deployed function.
reach() {
    hang_up
    local asked=(docker port "nuclio-$namespace-$1" 8080) address
    [[ $platform == local ]] || asked=(kubectl port-forward --namespace "$namespace" "service/nuclio-$1" :8080)
    if [[ -n $dry_run ]]; then
        call "${asked[@]}"
        address=:PORT
    elif [[ $platform == kube ]]; then
        # Without the lock: if this script is killed, it goes on, and would keep every later run out.
        coproc FORWARD { exec "${asked[@]}" 2>&1 9>&-; }
        IFS= read -r -t 30 address <&"${FORWARD[0]}" && [[ $address =~ 127\.0\.0\.1(:[0-9]+) ]] || return 1
        address=${BASH_REMATCH[1]}
    else
        address=$("${asked[@]}" 2>/dev/null) && [[ -n $address ]] || return 1
        address=${address%%$'\n'*} # a second line would be the IPv6 one
    fi
    url=http://localhost:${address##*:}/
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

# is_new RELEASE NAME: on Kubernetes a copy of the last release may answer for a while. Its device may differ, and CVAT,
# which the image is not told of before it is deployed.
is_new() {
    [[ $platform == kube && -z $dry_run ]] || return 0
    local answers=$STATE/releases/$1/answers
    [[ $(head -n 1 "$answers/$2" | of_image) == "$(of_image <"$answers/$2.deployed")" ]]
}

of_image() { sed 's/"device": *"[a-z]*"//; s/, *"cvat": *.*/}/'; }

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
        env_options < <(cat "$STATE/releases/$1/settings/$name" 2>/dev/null)
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
    point pending "$1"
    [[ -n $dry_run ]] || switching=$1
    activate "$1" || exit 1
    switching=''
    if [[ -n $current && $current != "$1" ]]; then
        previous=$current
        point previous "$previous"
    fi
    current=$1
    point current "$current"
    delete_others "$1" || die "release $1 is deployed and verified, but others are left: run this again"
    settle
    say "release $1 is deployed and verified"
}

on_exit() {
    local code=$?
    set +e               # one failure more must not end the way back,
    trap '' INT TERM HUP # nor a second Ctrl-C
    trap - EXIT
    hang_up
    [[ -z $carrying ]] || end_carrying
    if [[ -n $switching ]]; then
        # After a SIGHUP the terminal is gone, and nuctl too would fail to write there.
        [[ $code != 129 ]] || exec >>"$STATE/going-back.log" 2>&1
        if [[ -n $current && $current != "$switching" ]]; then
            say "going back to release $current; this cannot be interrupted"
            if activate "$current" && delete_others "$current"; then
                settle
                say "release $current is deployed again; $switching was given up"
            else
                say "release $current is not back: put right what is said above, then ./deploy.sh rollback$its_name"
            fi
        else
            say "there is no release to go back to: deleting what was deployed"
            delete_functions "$(functions_of "$switching")" && settle
        fi
        code=1
    fi
    exit "$code"
}

# Images and folders of all releases but the current and the one before.
forget_old_releases() {
    local releases=$STATE/releases tag path
    for tag in $(comm -23 <(images_of "$releases"/[0-9]*) <(images_of "$releases/$current" "$releases/$previous")); do
        delete_image "$tag"
    done
    for path in "$releases"/*; do
        [[ -n $dry_run || " $current $previous " == *" ${path##*/} "* ]] || rm -rf "$path"
    done
}

# images_of RELEASE_FOLDER ...: what they are to be deployed from, built or not
images_of() { cat "${@/%//image}" "${@/%//code}" 2>/dev/null | sort -u; }

delete_image() {
    call docker image inspect "$1" >/dev/null 2>&1 || return 0
    only_if='the image is there' call docker rmi "$1" >/dev/null || say "note: image $1 is still in use and stays"
}

# ---------------------------------------------------------------------------------------------- commands

deploy() {
    new_release
    describe_release
    write_requests
    write_options
    build_code
    build_weights
    deploy_release
}

deploy_weights() {
    need_image "$current_code"
    new_release
    inherit "$STATE/releases/$current"
    add_labels "$weights/manifest.json"
    name_image "$current_code"
    build_weights
    deploy_release
}

need_image() { # need_image TAG: of the current release, which only cpu and gpu can build again
    call docker image inspect "$1" >/dev/null ||
        die "image $1 is gone (docker image prune?): run ./deploy.sh cpu or gpu$its_name again"
}

deploy_release() { # the new one, whose image is built
    work_out_answers
    put_iterations_first
    [[ $platform == local ]] || call docker push "$image" >&2
    local projects
    projects=$(call nuctl get project cvat "${where[@]}" 2>/dev/null) || projects='' # there may be none
    grep -qw cvat <<<"$projects" || only_if='it is not there' call nuctl create project cvat "${where[@]}" >&2
    switch_to "$release"
    forget_old_releases
    show_release
    tell '\nLabels for a CVAT task (tab Raw of its label editor; "From model" makes the same by clicks):\n%s\n' \
        "$(labels)"
    [[ -z ${ADVCAM_CVAT_URL:-} ]] || check_with_cvat
}

# From inside the function: can it reach CVAT, and does CVAT see it as it is? What is wrong there ends no deployment.
check_with_cvat() {
    local name inside
    name=$(functions_of "$current" | head -n 1)
    if [[ $platform == local ]]; then
        inside=(docker exec --env "NUCLIO_FUNCTION_NAME=$name" "nuclio-$namespace-$name")
    else
        inside=(kubectl exec --namespace "$namespace" "deployment/nuclio-$name" -- env "NUCLIO_FUNCTION_NAME=$name")
    fi
    say ''
    call "${inside[@]}" python -m defectcam doctor >&2 ||
        say 'note: the deployment is verified; put right what is marked wrong above, then look again: docs/operate.md, "defectcam doctor"'
}

# After an interruption to the current release, else to the one before: a second rollback undoes the first.
rollback() {
    if [[ -n $pending ]]; then
        { activate "$current" && delete_others "$current"; } ||
            die "release $current is not back: put right what is said above, then once more"
        settle
    else
        switch_to "$previous"
    fi
    show_release
}

status() {
    local name
    show_release
    for name in $(named_deployments); do
        use_deployment "$name"
        tell '\n%s: ' "$name"
        show_release
    done
}

show_release() {
    local name
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
    [[ -z $pending ]] || tell 'deploying %s was interrupted: run it again, or ./deploy.sh %s\n' "$pending" \
        "$([[ -n $current ]] && echo rollback || echo remove)$its_name"
}

# CVAT's label editor wants `mutable` and a default as well.
labels() {
    awk '/^    spec: \|/ { inside = 1; next } inside && !/^      / { exit } inside' \
        "$STATE/releases/$current/functions/$(functions_of "$current" | head -n 1).yaml" |
        sed 's/^      //; s/"values": \["\([^"]*\)"/"mutable": false, "default_value": "\1", &/'
}

remove() {
    local tag name
    [[ -n $(functions_of_all) ]] || warn "$nothing"
    delete_functions "$(functions_of_all)" || die "not all is deleted: put right what is said above, then once more"
    for tag in $(images_of "$STATE"/releases/[0-9]*); do
        delete_image "$tag"
    done
    [[ -n $dry_run ]] || rm -rf "$STATE"
    for name in $(named_deployments); do
        say "note: $name stays: ./deploy.sh remove --name $name"
    done
}

# ---------------------------------------------------------------------------------------------- closed networks
#
# A saved release is a tar of three members: SHA256SUMS, which lists the files of the others; release/, what new releases
# inherit; images.tar, as docker saves image and code under the tags CARRIED.
CARRIED=("$IMAGE:carried" "$IMAGE:carried-code")

save() {
    local from=$STATE/releases/$current name image helper=''
    image=$(<"$from/image")
    [[ -f $from/nuclio || -n $dry_run ]] ||
        die "release $current does not say its Nuclio, being older than save: run ./deploy.sh $device$its_name again"
    need_image "$image"
    need_image "$current_code"
    if [[ $platform == local ]]; then # Nuclio pulls one image when it deploys: of the container that has nuctl's records
        call nuctl get project cvat "${where[@]}" >/dev/null 2>&1 || true
        helper=$(call docker inspect --format '{{.Config.Image}}' nuclio-local-storage-reader) ||
            die "container nuclio-local-storage-reader, whose image the other machine needs, is not there: is Nuclio running?"
        helper=${helper:-HELPER}
    fi
    carrying=$STATE/carried folder=$STATE/carried/release
    rm -rf "$carrying"
    mkdir -p "$folder" || die "cannot write to $STATE"
    inherit "$from"
    cp "$from/device" "$folder"
    printf '%s\n' "$deployment" >"$folder/deployment"
    for name in $(functions_of "$current"); do rewrite_function "$name"; done
    diff -r "$from/functions" "$folder/functions" >/dev/null ||
        say "note: CVAT's address and token are left out: set ADVCAM_CVAT_URL and ADVCAM_CVAT_TOKEN for load"
    call docker tag "$image" "${CARRIED[0]}"
    call docker tag "$current_code" "${CARRIED[1]}"
    say "saving the image, which may take minutes"
    call docker save --output "$carrying/images.tar" "${CARRIED[@]}" ${helper:+"$helper"} ||
        die "docker cannot save the image (see above): it is written to $carrying first, then to '$argument'"
    if [[ -z $dry_run ]]; then
        (cd "$carrying" && find release images.tar -type f -exec sha256sum {} + >SHA256SUMS)
        tar --create --directory "$carrying" --file=- SHA256SUMS release images.tar >"$argument.partial" ||
            die "cannot write '$argument' (see above)"
        mv "$argument.partial" "$argument"
    fi
    end_carrying
    say "release $current is saved in $argument"
}

member() { tar --extract --to-stdout --occurrence --file=- "$1" <"$argument" 2>/dev/null; }

# Check the whole file before anything is done with it. Sets $device and $saved_nuclio.
check_file() {
    local sums sum path saved
    sums=$(member SHA256SUMS) && [[ $sums == *"  release/deployment"* && $sums == *"  images.tar"* ]] ||
        die "'$argument' is not a file of ./deploy.sh save, or was cut off: copy it again"
    say "checking $argument"
    while read -r sum path; do
        [[ $(member "$path" | sha256sum) == "$sum "* ]] ||
            die "'$argument' is damaged or was cut off ($path): copy it again"
    done <<<"$sums"
    saved=$(member release/deployment)
    [[ -z $saved || $saved == "$deployment" ]] || die "'$argument' was saved with --name $saved: load it with that, too"
    [[ -n $saved || -z $deployment ]] || die "'$argument' was saved without --name: load it without, too"
    device=$(member release/device) saved_nuclio=$(member release/nuclio)
}

load() {
    local name
    new_release
    tar --extract --no-same-owner --file=- --directory "$folder" --strip-components=1 release <"$argument"
    for name in $(functions_of "$release"); do rewrite_function "$name"; done
    [[ $platform == kube ]] || rm -f "$folder/options"
    write_options
    name_image
    carrying=$STATE/carried
    say "loading the image"
    call docker load --quiet < <(member images.tar) >&2 || die "docker cannot load the image of '$argument' (see above)"
    call docker tag "${CARRIED[0]}" "$image"
    call docker tag "${CARRIED[1]}" "$code"
    end_carrying
    deploy_release
}

end_carrying() {
    call docker rmi "${CARRIED[@]}" >/dev/null 2>&1 || true # a run that was cut off may not have them
    rm -rf "$carrying"
    [[ $command != save ]] || rm -f "$argument.partial"
    carrying=''
}

# ---------------------------------------------------------------------------------------------- main

exec 3>&1 # where dry runs print, whatever becomes of a command's output
switching='' carrying=''
parse_arguments "$@"
mkdir -p "$ROOT/out/deploy"
use_deployment "$deployment"
exec 9>"$ROOT/out/deploy/lock"
[[ $command == status ]] || flock --nonblock 9 || die "another deploy.sh is at work in this folder"
device=$command
case $command in
    status) [[ -n $current$pending$(named_deployments) ]] || suppose_release "$nothing" ;;
    weights | rollback | save)
        [[ -n $current ]] || suppose_release "$nothing: ./deploy.sh cpu or gpu$its_name first"
        if [[ $command == rollback && -z $previous$pending ]]; then
            lack "there is no earlier release to go back to"
            previous=$current
        fi
        device=$(<"$STATE/releases/$current/device")
        current_code=$(<"$STATE/releases/$current/code")
        ;;
    load) check_file ;;
esac
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
