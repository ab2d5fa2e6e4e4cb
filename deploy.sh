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
TITLE_MAX=24 # characters of a name that CVAT's model list shows
NAME_MAX=16  # those of --name: "NAME defects" must fit
READY_SECONDS=${READY_SECONDS:-300}
ANSWER_SECONDS=${ANSWER_SECONDS:-300} # a CPU may take minutes for the sample with many climbing steps

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
name. If a deployed function does not answer as its weights must, everything goes back to the release before.

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
task that is being annotated, and defectcam doctor checks a new deployment. docs/deploy.md says whose token it must be,
and what to do about a defect that function.yaml has no label for.
EOF
}

warn() { printf 'deploy.sh: %s\n' "$@" >&2; }
die() { warn "$@"; exit 1; }
# Progress, which a dry run has none of. A closed terminal must not end the way back.
say() { [[ -n $dry_run ]] || printf '%s\n' "$*" >&2 || true; }
fail() { say "$@" && return 1; } # for what can be put right, where die would end the run

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
            --help | -h) usage && exit ;;
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
                if [[ $command =~ ^(weights|save|load)$ && -z $argument ]]; then
                    argument=$1 # whatever the path is called
                else
                    [[ $1 =~ ^(cpu|gpu|weights|rollback|status|remove|save|load)$ ]] ||
                        die "unknown command '$1'; ./deploy.sh --help"
                    [[ -z $command ]] || die "two commands, '$command' and '$1'; ./deploy.sh --help"
                    command=$1
                fi
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
        [[ $platform == local || -n $registry ]] || die "--platform kube needs --registry: the cluster pulls the image from there"
        [[ ${ADVCAM_CVAT_URL:+set} == "${ADVCAM_CVAT_TOKEN:+set}" ]] ||
            die "only one of ADVCAM_CVAT_URL and ADVCAM_CVAT_TOKEN is set: set both, or neither"
    else
        [[ -z $min_replicas$max_replicas$registry ]] ||
            die "--registry and replicas belong to cpu, gpu and load: '$command' keeps what is deployed"
    fi
    [[ ! $command =~ ^(weights|save|load)$ || -n $argument ]] || die "$command needs a path; ./deploy.sh --help"
    [[ $command != weights ]] || weights=$argument
    weights=${weights:-$ROOT/weights}
    case $command in
        cpu | gpu | weights)
            [[ -f $weights/manifest.json ]] || die "no weights in '$weights': it has no manifest.json"
            compgen -G "$weights/*.safetensors" >/dev/null || die "no weights in '$weights': it has no *.safetensors"
            ;;
        save)
            [[ ! -e $argument ]] || die "'$argument' is there already: name another file, or delete it"
            [[ -w $(dirname "$argument") ]] || die "cannot write '$argument': make its folder, or name another one"
            ;;
        load) [[ -f $argument && -r $argument ]] || die "cannot read '$argument': name a file of ./deploy.sh save" ;;
    esac
    where=(--platform "$platform" --namespace "$namespace")
}

# ---------------------------------------------------------------------------------------------- what is needed

check_needs() {
    local missing=() tool
    for tool in docker nuctl curl $([[ $platform == local ]] || echo kubectl); do
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
    local asked=(docker info --format '{{json .Runtimes}}') wanted=nvidia found
    local problem='docker has no NVIDIA runtime: install NVIDIA Container Toolkit, then nvidia-ctk runtime configure'
    if [[ $platform == kube ]]; then
        asked=(kubectl get nodes --output 'jsonpath={..allocatable.nvidia\.com/gpu}') wanted='[1-9]'
        problem="no node of the cluster offers nvidia.com/gpu: install NVIDIA's device plugin"
    fi
    found=$(call "${asked[@]}")
    [[ -n $dry_run || $found =~ $wanted ]] || die "$problem"
}

check_disk() {
    local needed=8 folder free
    [[ $device != gpu ]] || needed=25 # GB: PyTorch with CUDA, once in the build and once in the image
    [[ $command != weights ]] || needed=2
    [[ $command != load ]] || needed=$((2 * $(stat -L -c %s "$argument") / 1000000000 + 1)) # docker unpacks it first
    folder=$(call docker info --format '{{.DockerRootDir}}')
    [[ -z $dry_run && -d $folder ]] || return 0 # without it the daemon is on another machine
    free=$(df -Pk "$folder" | awk 'NR == 2 { print int($4 / 1e6) }')
    ((free >= needed)) || die "$folder has $free GB free, but $needed GB are needed: docker system prune, or a larger disk"
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

# The name of the release that a link points to; nothing where there is no link.
release_of() { basename "$(readlink "$STATE/$1")"; }
point() { # point LINK RELEASE: the link and its variable; in one step, so that no interruption leaves half a link
    printf -v "$1" '%s' "$2"
    [[ -z $dry_run ]] || return 0
    ln -sfn "releases/$2" "$STATE/$1.new"
    mv -T "$STATE/$1.new" "$STATE/$1"
}
settle() { pending=''; [[ -n $dry_run ]] || rm -f "$STATE/pending"; } # what was pending is deployed, or gone

new_release() { # new_release [NAME OF A DRY RUN]: sets $release and $folder
    if [[ -n $dry_run ]]; then
        release=${1:-dry-run}
        rm -rf "$STATE/releases/$release"
    else
        local now number=1
        now=$(date -u +%Y%m%d-%H%M%S)
        release=$now
        while [[ -e $STATE/releases/$release ]]; do # a run of this very second
            release=$now.$((++number))
        done
    fi
    folder=$STATE/releases/$release
    mkdir -p "$folder"/{functions,settings,answers} || die "cannot write to $STATE/releases"
}

inherit() { # the new release gets all of the current one but what image and weights decide
    local part from=$STATE/releases/$current
    for part in names functions settings options nuclio detector.json interactor.json; do
        [[ ! -e $from/$part ]] || cp -r "$from/$part" "$folder"
    done
}

write_options() { # further options of nuctl deploy
    local options=(${min_replicas:+--min-replicas "$min_replicas"} ${max_replicas:+--max-replicas "$max_replicas"})
    ((${#options[@]} == 0)) || printf '%s\n' "${options[@]}" >"$folder/options"
}

# Names of a release's functions, the default first.
functions_of() { [[ -z $1 ]] || cat "$STATE/releases/$1/names"; }
# Names of all functions that may be deployed, those of runs that were cut off too. A dry run's folder has none.
functions_of_all() { cat "$STATE"/releases/[0-9]*/names 2>/dev/null | sort -u; }
# images_of RELEASE_FOLDER ...: what they are to be deployed from, built or not
images_of() { cat "${@/%//image}" "${@/%//code}" </dev/null 2>/dev/null | sort -u; }

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
    printf '%s\n' "$name" >>"$folder/names"
    printf '%s\n' "$title" >"$folder/functions/$name.title"
    write_function "$template" "$name" "$title"
}

# write_function FILE NAME TITLE: the release's file of function NAME, made from FILE, a template or this very file.
#
# nuctl could override all but two things: it cuts an annotation at its second "=", and it builds again, whatever
# --run-image says, as long as the file has spec.build. Hence a file for each function.
write_function() {
    local file=$folder/functions/$2.yaml manifest=$weights/manifest.json cvat_of=file default
    default=$(head -n 1 "$folder/names")
    [[ $1 != "$file" || $command == weights ]] || manifest=/dev/null # a file of a release has the labels
    if [[ $command == save ]]; then # a token stays on its machine; a reference to a Secret may go
        ! grep -q '^ADVCAM_CVAT_TOKEN=' <(file_variables "$1") || cvat_of=nothing
    else
        [[ -z ${ADVCAM_CVAT_TOKEN:+set} || ($1 == "$file" && $command != load) ]] || cvat_of=environment
        # An entry with a T of its own is chosen for that T: the task's label must not replace it. A click has no T.
        if [[ $(type_of "$1") == interactor ]] || grep -qs '^ADVCAM_ITERATIONS=' "$folder/settings/$2"; then cvat_of=nothing; fi
    fi
    # The token is read by awk alone: other users can see a program's arguments, and `bash -x` prints bash's values.
    MANIFEST=$manifest ANSWERS=$folder/answers/$default LC_ALL=C awk -v name="$2" -v title="$3" -v cvat_of="$cvat_of" \
        -v default_name="$default" "$FUNCTION_PROGRAM" "$1" >"$file.new" || exit 1
    mv "$file.new" "$file"
}

rewrite_functions() { # those of the new release, or of the one that is saved
    local name
    for name in $(<"$folder/names"); do
        write_function "$folder/functions/$name.yaml" "$name" "$(<"$folder/functions/$name.title")"
    done
}

# Prints a function file with the name, title and CVAT variables that are asked for, and without spec.build.
# - Every defect of the weights' manifest gets a label if there is none: like the first label of type polygon but for
#   name and colour, before the tags. defectcam/cvat_labels.py has the same rules; a test holds the two together.
# - The T that the weights answer with comes first in its label's select: "From model" makes the first one the default.
# awk, since there is no Python outside the image.
# shellcheck disable=SC2016
FUNCTION_PROGRAM='
function complain(problem) { print "deploy.sh: " problem >"/dev/stderr"; failed = 1 }

# Sets, by the path of keys and places from 1 on, joined by SUBSEP: value[PATH], and first[PATH] and last[PATH], where its
# text begins and ends. paths[1..count] are in the order of the text.
function read_json(text, at, begin, token, depth, path, inside, is_list, place, is_key, key) {
    split("", value); split("", first); split("", last); count = 0
    while (match(substr(text, at + 1), /"([^"\\]|\\.)*"|[][{},]|[^][{},:" \t\r\n]+/)) {
        begin = at + RSTART
        at = begin + RLENGTH - 1
        token = substr(text, begin, RLENGTH)
        if (token == ",") { place[depth]++; is_key = !is_list[depth]; continue }
        if (token ~ /^[]}]/) { last[inside[depth--]] = at; is_key = 0; continue }
        if (is_key) { key = text_of(token); is_key = 0; continue }
        path = depth ? inside[depth] SUBSEP (is_list[depth] ? place[depth] : key) : ""
        paths[++count] = path; first[path] = begin; last[path] = at
        value[path] = token ~ /^"/ ? text_of(token) : token
        if (token ~ /^[[{]/) { inside[++depth] = path; is_key = token == "{"; is_list[depth] = !is_key; place[depth] = 1 }
    }
}
function text_of(string, text, c, code, high, i) { # of a JSON string with its quotes, in UTF-8
    string = substr(string, 2, length(string) - 2)
    while (match(string, /\\./)) {
        text = text substr(string, 1, RSTART - 1)
        c = substr(string, RSTART + 1, 1)
        string = substr(string, RSTART + 2)
        if (c == "u") {
            code = 0
            for (i = 1; i <= 4; i++) code = 16 * code + index("123456789abcdef", tolower(substr(string, i, 1)))
            code += high
            string = substr(string, 5)
            high = code >= 55296 && code < 56320 ? 65536 + (code - 55296) * 1024 - 56320 : 0 # the first half of a pair
            c = high ? "" : utf8(code)
        } else if (index("bfnrt", c)) c = "\n"
        text = text c
    }
    return text string
}
function utf8(code, tail, room) { # six bits in every byte but the first
    if (code < 128) return code < 32 ? "\n" : sprintf("%c", code) # no name may have any of the control characters
    for (room = 64; code >= room; room /= 2) {
        tail = sprintf("%c", 128 + code % 64) tail
        code = int(code / 64)
    }
    return sprintf("%c", 256 - 2 * room + code) tail
}
function check_name(defect, characters, why) {
    characters = defect
    gsub(/[\200-\277]/, "", characters) # of a character of several bytes the first one counts
    if (defect == "") why = "is empty"
    else if (defect == "unprocessed" || defect == "notice") why = "is the tag \047" defect "\047 of the function"
    else if (defect ~ /^ | $/) why = "begins or ends with a blank"
    else if (length(characters) > 64) why = "has " length(characters) " characters, but CVAT takes 64"
    else if (defect ~ /[\001-\037\177]|\302[\200-\237]|\342\200[\250\251]/) why = "has a control character or a line break"
    else return
    complain(ENVIRON["MANIFEST"] ": the defect\047s name \047" defect "\047 " why \
        ": give it another name (defectcam calibrate --defect NAME)")
}
function with_label(spec, defect, labels, kind, like, tag, before, after, made, colours, i) {
    read_json(spec)
    for (labels = 0; ("", labels + 1) in first; labels++) {
        if (value["", labels + 1, "name"] == defect) return spec
        kind = value["", labels + 1, "type"]
        if (!like && kind == "polygon") like = labels + 1
        if (!tag && kind == "tag") tag = labels + 1
    }
    if (!like) {
        complain(FILENAME " has no label of type polygon; the label of \047" defect "\047 is made like that: add one, " \
            "such as crack")
        exit 1
    }
    before = substr(spec, first["", like], first["", like, "name"] - first["", like])
    after = substr(spec, last["", like, "name"] + 1, last["", like] - last["", like, "name"])
    sub(/"color": *"[^"]*", */, "", before)
    sub(/, *"color": *"[^"]*"/, "", after)
    colours = split("#00dc78 #ff00ff #00e5ff #b4ff00 #aa5aff #ff7800", colour, " ")
    for (i = 1; i <= colours && index(spec, "\"" colour[i] "\""); i++) continue
    if (i > colours) i = labels % colours + 1
    if (name == default_name) print "note: the weights have a defect \047" defect "\047; add the label \047" defect \
        "\047 to your task in CVAT (docs/annotate.md, \"Labels\"), which drops its proposals otherwise" >"/dev/stderr"
    gsub(/["\\]/, "\\\\&", defect)
    made = before "\"" defect "\", \"color\": \"" colour[i] "\"" after
    if (tag) return substr(spec, 1, first["", tag] - 1) made ",\n        " substr(spec, first["", tag])
    return substr(spec, 1, last["", labels]) ",\n        " made substr(spec, last["", labels] + 1)
}
function with_iterations_first(spec, i, j, path, steps, values) {
    read_json(spec)
    for (i = count; i; i--) { # from the end, since what comes before keeps its place
        path = paths[i]
        if (split(path, keys, SUBSEP) != 5 || keys[5] != "values" || !(value["", keys[2], "name"] in iterations)) continue
        if (value["", keys[2], "attributes", keys[4], "name"] != "iterations") continue
        steps = iterations[value["", keys[2], "name"]]
        values = "\"" steps "\""
        for (j = 1; (path, j) in first; j++) if (value[path, j] != steps) values = values ", \"" value[path, j] "\""
        spec = substr(spec, 1, first[path]) values substr(spec, last[path])
    }
    return spec
}
function print_spec(i) {
    in_spec = 0
    for (i = 1; i <= defects; i++) spec = with_label(spec, defect[i])
    printf "%s", with_iterations_first(spec)
}

function env_entry(variable, content) {
    content = ENVIRON[variable]
    gsub(/^[ \t\r\n]+|[ \t\r\n]+$/, "", content)
    if (content !~ /^[!-~]+$/ || content ~ /["\047\\]/) complain(variable " has a blank, a quote or a control character in it")
    return "    - name: " variable "\n      value: \"" content "\"\n"
}

BEGIN {
    if (cvat_of == "environment") entries = env_entry("ADVCAM_CVAT_URL") env_entry("ADVCAM_CVAT_TOKEN")
    while ((getline line <ENVIRON["MANIFEST"]) > 0) manifest = manifest line "\n"
    read_json(manifest)
    for (i = 1; i <= count; i++)
        if (split(paths[i], keys, SUBSEP) == 3 && keys[2] == "defects") check_name(defect[++defects] = keys[3])
    getline answer <ENVIRON["ANSWERS"]
    read_json(answer)
    for (i = 1; i <= count; i++)
        if (split(paths[i], keys, SUBSEP) == 4 && keys[2] == "defaults" && keys[4] == "iterations")
            iterations[keys[3]] = value[paths[i]]
    if (failed) exit 1
}
/^    spec: *\|/ { in_spec = 1; print; next }
in_spec && /^(      |[ \t]*$)/ { spec = spec $0 "\n"; next }
in_spec { print_spec() }
/^(  )?[a-z]/ { block = $1; skipping = block == "build:" }
block == "env:" && /^    - / { skipping = cvat_of != "file" && /name: *["\047]?ADVCAM_CVAT_(URL|TOKEN)(["\047 ,#]|$)/ }
skipping { next }
/^  name:/ { print "  name: " name; next }
block == "annotations:" && /^    name:/ { print "    name: \"" title "\""; next }
{ print }
/^  env:/ { printf "%s", entries }
END { if (in_spec) print_spec() }'

# add_preset TITLE KEY=VALUE ...: one more entry in CVAT's model list, keys as in a request.
add_preset() {
    local title=$1 name setting settings=()
    shift
    [[ $title =~ ^[A-Za-z0-9][A-Za-z0-9\ =.,+-]*$ ]] ||
        die "a preset's name is '$title', but may have letters, digits, spaces and =.,+- only"
    (($# > 0)) || die "preset '$title' sets nothing: NAME | key=value ..."
    for setting in "$@"; do
        [[ $setting =~ ^(iterations|threshold|cam_threshold|defects|shape|tolerance_px|hole_share|max_proposals)=. ]] ||
            die "preset '$title' has '$setting', but needs key=value with a key of README.md, \"Settings\""
        settings+=("ADVCAM_${BASH_REMATCH[1]^^}=${setting#*=}")
        [[ $setting != iterations=* ]] || grep -q "\"iterations\".*\"${setting#*=}\"" "$template" ||
            say "note: the labels have no iterations '${setting#*=}': its shapes will show the task's default"
    done
    name=$(tr -cs '[:alnum:]' - <<<"${title,,}")
    add_function "$template" "${name%-}" "$title" "${settings[@]}"
}

describe_release() { # the functions that cpu and gpu were asked for, and the sample as CVAT sends it to them
    local template=$ROOT/function.yaml count line title words encoded
    [[ $device != gpu ]] || template=$ROOT/function-gpu.yaml
    add_function "$template" '' ''
    for count in ${iterations//,/ }; do
        [[ $count =~ ^[0-9]{1,2}$ && $((10#$count)) -le 50 ]] ||
            die "--iterations has '$count', but may have numbers from 0 to 50, as in 0,2,8"
        add_preset "AdvCAM defects T=$count" "iterations=$count"
    done
    [[ -z $presets || -f $presets ]] || die "--presets is '$presets', but there is no such file"
    while IFS= read -r line || [[ -n $line ]]; do
        line=${line%%#*}
        [[ $line == *[![:space:]]* ]] || continue
        [[ $line == *'|'* ]] || die "$presets has '$line', but a line must be: NAME | key=value ..."
        read -r title <<<"${line%%|*}"
        read -ra words <<<"${line#*|}"
        add_preset "$title" "${words[@]}"
    done <"${presets:-/dev/null}"
    [[ ! -f $ROOT/interactor.yaml ]] || add_function "$ROOT/interactor.yaml" '' ''
    encoded=$(base64 -w 0 "$SAMPLE")
    printf '{"image": "%s"}' "$encoded" >"$folder/detector.json"
    printf '{"image": "%s", "pos_points": [[560.0, 560.0]], "neg_points": [], "obj_bbox": null}' "$encoded" \
        >"$folder/interactor.json" # a click on the spall
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
    current=RELEASE previous=RELEASE
}

build_code() {
    local arguments=(--build-arg "NUCLIO_VERSION=$nuclio_version" --build-arg "DEVICE=$device")
    # OpenVINO can run the weights if every defect has a graph, and none climbs as the paper does.
    if [[ $device == cpu ]] &&
        (($(in_manifest '"file": *"') != $(in_manifest '"graph": *"[^"]') || $(in_manifest '"form": *"paper"') > 0)); then
        say "not all of $weights can be run by OpenVINO: the image gets PyTorch"
        arguments+=(--build-arg ENGINE=torch)
    fi
    name_image
    printf '%s\n' "$nuclio_version" >"$folder/nuclio"
    say "building $code"
    call docker build "${arguments[@]}" --target code --tag "$code" "$ROOT" >&2
}

# How often the weights' manifest.json has something.
in_manifest() { grep -o "$1" "$weights/manifest.json" | wc -l; }

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
    call docker run --rm --interactive "$@" python -c "$RUN_STDIN" < <(printf '%s\f' "$program" && cat)
}

type_of() { sed -nE 's/^    type:[^a-z]*(detector|interactor).*/\1/p' "$1"; } # of a function file
# request_for RELEASE NAME: the file of the request for that function
request_for() { printf '%s' "$STATE/releases/$1/$(type_of "$STATE/releases/$1/functions/$2.yaml").json"; }

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

# env_options FILE ...: for docker and nuctl, what is set by the lines KEY=VALUE of those files that are there
env_options() { cat "$@" 2>/dev/null | sed 's/^/--env\n/'; }

# What every function must answer, from the image itself. It proves weights and settings before anything is touched.
work_out_answers() {
    # The image is run alone: without CVAT, without folders that are mounted later, on Kubernetes without its GPU.
    local name options gpus=() advice='' not_here='LOG_DIR|WEIGHTS|CVAT_.*'
    [[ $platform == local ]] || not_here+='|DEVICE'
    if [[ $device == gpu && $platform == local ]]; then
        gpus=(--gpus all --env ADVCAM_DEVICE=cuda) # without it a GPU that PyTorch cannot use would be passed over
        advice="; a GPU needs NVIDIA's driver 580 or newer, the first for CUDA 13: nvidia-smi"
    fi
    for name in $(functions_of "$release"); do
        say "working out what $name must answer"
        # Of a variable given twice the last one counts: the file's, then the preset's.
        mapfile -t options < <(env_options \
            <(file_variables "$folder/functions/$name.yaml" | grep -vE "^ADVCAM_($not_here)=") "$folder/settings/$name")
        run_program "$ANSWER_PROGRAM" ${gpus[@]+"${gpus[@]}"} ${options[@]+"${options[@]}"} \
            "$image" <"$(request_for "$release" "$name")" >"$folder/answers/$name" ||
            die "$name cannot be deployed: its image, weights or settings do not work (see above)$advice"
        ! grep -q '"unprocessed"' <(tail -n 1 "$folder/answers/$name") ||
            die "$name cannot process $SAMPLE: $(tail -n 1 "$folder/answers/$name")"
    done
}

# ---------------------------------------------------------------------------------------------- deploying

ask() { call curl --noproxy '*' --silent --fail "$@"; } # a function: on this machine, whatever proxy the network has

# reach NAME: sets $url to where this machine reaches a deployed function, and $url_for_cvat to where CVAT does.
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
    url=http://localhost:${address##*:}/ url_for_cvat=http://nuclio-$1.$namespace.svc.cluster.local:8080/
    [[ $platform == kube ]] || url_for_cvat=$url
}

hang_up() { # end the port forwarding of the last reach
    [[ -z ${FORWARD_PID:-} ]] || { kill "$FORWARD_PID" && wait "$FORWARD_PID"; } 2>/dev/null || true
}

# is_new RELEASE NAME: on Kubernetes a copy of the last release may answer for a while. Its device may differ, and CVAT,
# which the image is not told of before it is deployed.
is_new() {
    local answers=$STATE/releases/$1/answers of_image='1!d; s/"device": *"[a-z]*"//; s/, *"cvat": *.*/}/'
    [[ $platform == local || -n $dry_run || $(sed "$of_image" "$answers/$2") == "$(sed "$of_image" "$answers/$2.deployed")" ]]
}

# verify RELEASE NAME: wait until it answers, then compare its answer to the sample with the expected one.
verify() {
    local deadline=$((SECONDS + READY_SECONDS)) answer=$STATE/releases/$1/answers/$2.deployed
    until reach "$2" && ask --max-time 10 --output "$answer" "$url" && is_new "$1" "$2"; do
        ((SECONDS < deadline)) ||
            fail "$2 did not get ready, with the weights and settings deployed, within $READY_SECONDS s" || return 1
        sleep 1
    done
    [[ -n $dry_run ]] || printf '\n' >>"$answer"
    ask --show-error --max-time "$ANSWER_SECONDS" --header 'Content-Type: application/json' --data-binary \
        "@$(request_for "$1" "$2")" "$url" >>"$answer" || return 1
    run_program "$COMPARE_PROGRAM" "$(<"$STATE/releases/$1/image")" < <(cat "${answer%.deployed}" "$answer") ||
        fail "$2 does not answer as its weights must"
}

# activate RELEASE: deploy and verify all its functions.
activate() {
    local name options from=$STATE/releases/$1
    for name in $(functions_of "$1"); do
        say "deploying $name"
        mapfile -t options < <(cat <(env_options "$from/settings/$name") "$from/options" 2>/dev/null)
        [[ $(<"$from/device") != gpu ]] || grep -q '^[^#]*nvidia.com/gpu' "$from/functions/$name.yaml" ||
            options+=(--resource-limit nvidia.com/gpu=1)
        call nuctl deploy "$name" --project-name cvat --file "$from/functions/$name.yaml" \
            --run-image "$(<"$from/image")" ${options[@]+"${options[@]}"} "${where[@]}" >&2 ||
            fail "nuctl could not deploy $name (see above)" || return 1
        verify "$1" "$name" || {
            [[ $platform == kube ]] || call docker logs --tail 20 "nuclio-$namespace-$name" >&2 || true
            return 1
        }
    done
}

# Delete all functions but a release's; without RELEASE all. To delete one that is not there is no error.
delete_others() {
    local name failed=0
    for name in $(functions_of_all | grep -vxF -f <(functions_of "$1")); do
        say "deleting $name"
        # --force: a run that was cut off leaves functions "building", which Nuclio keeps otherwise.
        call nuctl delete function "$name" --force "${where[@]}" >&2 || fail "nuctl could not delete $name (see above)" ||
            failed=1
    done
    return "$failed"
}

# switch_to RELEASE: the one way by which a release becomes current. What ends it early, on_exit puts right.
switch_to() {
    point pending "$1"
    [[ -n $dry_run ]] || switching=$1
    activate "$1" || exit 1
    switching=''
    [[ -z $current || $current == "$1" ]] || point previous "$current"
    point current "$1"
    delete_others "$1" || die "release $1 is deployed and verified, but others are left: run this again"
    settle
    say "release $1 is deployed and verified"
}

# Deploy the current release again, after a run that was cut off.
restore() { activate "$current" && delete_others "$current" && settle; }

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
        if [[ -z $current || $current == "$switching" ]]; then
            say "there is no release to go back to: deleting what was deployed"
            delete_others '' && settle
        elif say "going back to release $current; this cannot be interrupted" && restore; then
            say "release $current is deployed again; $switching was given up"
        else
            say "release $current is not back: put right what is said above, then ./deploy.sh rollback$its_name"
        fi
        code=1
    fi
    exit "$code"
}

# Images and folders of all releases but the current and the one before.
forget_old_releases() {
    local path
    delete_other_images "$current" "$previous"
    for path in "$STATE"/releases/*; do
        [[ -n $dry_run || " $current $previous " == *" ${path##*/} "* ]] || rm -rf "$path"
    done
}

delete_other_images() { # delete_other_images RELEASE ...: those that none of these releases needs
    local tag
    for tag in $(comm -23 <(images_of "$STATE"/releases/[0-9]*) <(images_of "${@/#/$STATE/releases/}")); do
        call docker image inspect "$tag" >/dev/null 2>&1 || continue
        only_if='the image is there' call docker rmi "$tag" >/dev/null || say "note: image $tag is still in use and stays"
    done
}

# ---------------------------------------------------------------------------------------------- commands

deploy() {
    new_release
    describe_release
    write_options
    build_code
    build_weights
    deploy_release
}

deploy_weights() {
    need_image "$current_code"
    new_release
    inherit
    rewrite_functions
    name_image "$current_code"
    build_weights
    deploy_release
}

need_image() { # need_image TAG: of the current release, which only cpu and gpu can build again
    call docker image inspect "$1" >/dev/null ||
        die "image $1 is gone (docker image prune?): run ./deploy.sh cpu or gpu$its_name again"
}

deploy_release() { # the new one, whose image is built
    local default
    default=$(head -n 1 "$folder/names")
    work_out_answers
    rewrite_functions # now that it is known with which T the weights answer
    [[ $platform == local ]] || call docker push "$image" >&2
    call nuctl get project cvat "${where[@]}" 2>/dev/null | grep -w cvat >/dev/null ||
        only_if='it is not there' call nuctl create project cvat "${where[@]}" >&2
    switch_to "$release"
    forget_old_releases
    show_release
    printf '\nLabels for a CVAT task (tab Raw of its label editor; "From model" makes the same by clicks):\n'
    # CVAT's label editor wants `mutable` and a default as well.
    sed -nE '/^    spec: *\|/,/^ {0,5}[^ ]/ { s/"values": \["([^"]*)"/"mutable": false, "default_value": "\1", &/; s/^ {6}//p }' \
        "$folder/functions/$default.yaml"
    [[ -z ${ADVCAM_CVAT_URL:-} ]] || check_with_cvat "$default"
}

# From inside the function: can it reach CVAT, and does CVAT see it as it is? What is wrong there ends no deployment.
check_with_cvat() {
    local inside=(docker exec --env "NUCLIO_FUNCTION_NAME=$1" "nuclio-$namespace-$1")
    [[ $platform == local ]] ||
        inside=(kubectl exec --namespace "$namespace" "deployment/nuclio-$1" -- env "NUCLIO_FUNCTION_NAME=$1")
    say ''
    call "${inside[@]}" python -m defectcam doctor >&2 ||
        say 'note: the deployment is verified; put right what is marked wrong above, then look again:' \
            'docs/operate.md, "defectcam doctor"'
}

# After an interruption to the current release, else to the one before: a second rollback undoes the first.
rollback() {
    if [[ -n $pending ]]; then
        restore || die "release $current is not back: put right what is said above, then once more"
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
        printf '\n%s: ' "$name"
        show_release
    done
}

show_release() {
    local name
    [[ -z $current ]] || printf 'release %s\n' "$current"
    for name in $(functions_of "$current"); do
        printf '%-26s' "$(<"$STATE/releases/$current/functions/$name.title")"
        if reach "$name" && ask --max-time 10 --output "$STATE/answer" "$url"; then
            [[ -n $dry_run ]] || printf '%s  weights %s\n' "$url_for_cvat" \
                "$(sed 's/.*"weights": *"\([^"]*\)".*/\1/' "$STATE/answer")"
        else
            printf 'does not answer: nuctl get function %s %s\n' "$name" "${where[*]}"
        fi
    done
    [[ -z $previous ]] || printf 'rollback goes to release %s\n' "$previous"
    [[ -z $pending ]] || printf 'deploying %s was interrupted: run it again, or ./deploy.sh %s\n' "$pending" \
        "$([[ -n $current ]] && echo rollback || echo remove)$its_name"
}

remove() {
    local name
    [[ -n $(functions_of_all) ]] || warn "$nothing"
    delete_others '' || die "not all is deleted: put right what is said above, then once more"
    delete_other_images
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
    local from=$STATE/releases/$current image helper=''
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
    inherit
    cp "$from/device" "$folder"
    printf '%s\n' "$deployment" >"$folder/deployment"
    rewrite_functions
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
        [[ $(member "$path" | sha256sum) == "$sum "* ]] || die "'$argument' is damaged or was cut off ($path): copy it again"
    done <<<"$sums"
    saved=$(member release/deployment)
    [[ -z $saved || $saved == "$deployment" ]] || die "'$argument' was saved with --name $saved: load it with that, too"
    [[ -n $saved || -z $deployment ]] || die "'$argument' was saved without --name: load it without, too"
    device=$(member release/device) saved_nuclio=$(member release/nuclio)
}

load() {
    new_release
    tar --extract --no-same-owner --file=- --directory "$folder" --strip-components=1 release <"$argument"
    rewrite_functions
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

switching='' carrying=''
parse_arguments "$@"
exec 3>&1 # where dry runs print commands, whatever becomes of their output; they have no other results
[[ -z $dry_run ]] || exec >/dev/null
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
