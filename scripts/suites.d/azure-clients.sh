# shellcheck shell=bash
# shellcheck disable=SC2154 # set by scripts/suites
# The official Azure clients for Python and Rust, unchanged, against the embedded key vault: every
# operation on keys, pollers, pages, credentials of each kind, with challenge verification on. For
# that the vaults are asked under their names, which a mount namespace's own /etc/hosts resolves.

suite_azure_clients() {
    local dir=$1 vault=$1/vault hsm=$1/hsm skipped=no
    need_packages python3 python3-venv ca-certificates
    need_cargo
    mkdir "$dir/log" "$dir/run"
    clients_vault "$vault" kv1 vault --no-purge-protection
    clients_vault "$hsm" hsm1 mhsm --no-purge-protection
    clients_identity "$vault" officer
    in_vault_dir "$vault" grant --identity officer --key-permissions all
    clients_identity "$vault" wrapper
    in_vault_dir "$vault" grant --identity wrapper --key-permissions wrapKey,unwrapKey
    clients_identity "$hsm" officer
    in_vault_dir "$hsm" role assign --identity officer --role 'Managed HSM Crypto User'
    in_vault_dir "$hsm" role assign --identity officer --role 'Managed HSM Crypto Officer'
    # The identity endpoint of a machine needs an identity: start again, now that it is there.
    clients_stop "$vault"
    clients_serve "$vault" --imds officer

    cat "$vault/ca.pem" "$hsm/ca.pem" >"$dir/ca.pem"
    {
        cat /etc/hosts
        echo '127.0.0.1 kv1.vault.localhost hsm1.managedhsm.localhost login.localhost'
    } >"$dir/hosts"
    export CONFORMANCE_VAULT_DIR=$vault CONFORMANCE_HSM_DIR=$hsm
    CONFORMANCE_VAULT=https://kv1.vault.localhost:$(clients_port "$vault")
    CONFORMANCE_HSM=https://hsm1.managedhsm.localhost:$(clients_port "$hsm")
    CONFORMANCE_AUTHORITY=https://login.localhost:$(clients_port "$vault")
    export CONFORMANCE_VAULT CONFORMANCE_HSM CONFORMANCE_AUTHORITY
    export REQUESTS_CA_BUNDLE=$dir/ca.pem SSL_CERT_FILE=$dir/ca.pem NO_PROXY='*' no_proxy='*'

    clients_python "$dir" || return 1
    clients_rust "$dir" || return 1
    [[ $skipped == no ]] || say "${red}NOT COMPLETE: see what was skipped above$plain"
}

# clients_vault DIR NAME FLAVOR [OPTION...]: a new vault, served until the end.
clients_vault() {
    local vault=$1 options=()
    [[ " $* " != *' --no-purge-protection '* ]] || options+=(--no-purge-protection)
    "$byokfs" vault init "$vault" --name "$2" --flavor "$3" "${options[@]}" >>"$dir/log/vault.log"
    on_exit clients_stop "$vault"
    clients_serve "$vault"
}

clients_serve() { # DIR [OPTION...]
    local vault=$1 pid
    pid=$(detached "$dir/log/vault.log" "$byokfs" vault serve "$@")
    echo "$pid" >"$dir/run/${vault##*/}.pid"
    if ! wait_until 30 clients_ready "$vault" "$pid" || dead "$pid"; then
        tail -n 20 "$dir/log/vault.log" >&2
        return 1
    fi
}

clients_ready() { [[ -s $1/url && -s $1/identity.url ]] || dead "$2"; }

clients_stop() { # DIR
    local file
    file=$(dirname "$1")/run/${1##*/}.pid
    [[ -s $file ]] || return 0
    end_process "$(cat "$file")" byokfs
    rm -f "$file"
}

in_vault_dir() { # DIR VERB...
    local vault=$1
    shift
    BYOKFS_VAULT=$vault "$byokfs" vault "$@" >>"$dir/log/vault.log"
}

clients_identity() { in_vault_dir "$1" identity create "$2"; } # DIR NAME

clients_port() { sed 's,.*:,,; s,/.*,,' "$1/url"; } # DIR

# Runs a command that resolves the vaults' names.
with_names() {
    # shellcheck disable=SC2016 # for the inner shell
    unshare --mount bash -c 'mount --bind "$1" /etc/hosts; shift; exec "$@"' - "$dir/hosts" "$@"
}

# True if the failure in LOG is that of a network without the registry.
unreachable_in() {
    grep -qiE 'NewConnectionError|Temporary failure in name resolution|Could not resolve host|ConnectTimeout|ConnectionError|Network is unreachable|Connection refused|Failed to connect to|Timeout was reached' "$1"
}

clients_python() { # DIR
    local log=$1/pip.log requirements=$repo/tests/conformance/python/requirements.txt venv
    venv=$tools/azure-clients-$(md5sum <"$requirements" | cut -c 1-12)
    if [[ ! -e $venv/complete ]]; then
        note "installing the Python clients, once"
        rm -rf "$venv"
        python3 -m venv "$venv"
        if ! env -u REQUESTS_CA_BUNDLE -u SSL_CERT_FILE -u NO_PROXY -u no_proxy \
            "$venv/bin/pip" install --quiet -r "$requirements" </dev/null >"$log" 2>&1; then
            rm -rf "$venv"
            if unreachable_in "$log"; then
                say "${red}skipped: the Python clients, because PyPI cannot be reached$plain"
                skipped=yes
                return 0
            fi
            tail -n 20 "$log" >&2
            return 1
        fi
        touch "$venv/complete"
    fi
    with_names "$venv/bin/python" "$repo/tests/conformance/python/conformance.py" >"$1/python.log" 2>&1 ||
        { tail -n 80 "$1/python.log" >&2 && return 1; }
    say "Python: $(grep -E '^Ran ' "$1/python.log")"
}

clients_rust() { # DIR
    local log=$1/cargo.log crate=$repo/tests/conformance/rust target=$tools/azure-clients-rust
    note "building the Rust clients, once"
    if ! (cd "$crate" && env -u SSL_CERT_FILE -u NO_PROXY -u no_proxy \
        cargo build --quiet --locked --target-dir "$target" </dev/null >"$log" 2>&1); then
        if unreachable_in "$log"; then
            say "${red}skipped: the Rust clients, because the registry cannot be reached$plain"
            skipped=yes
            return 0
        fi
        tail -n 20 "$log" >&2
        return 1
    fi
    # One request to the authority's token endpoint, by an application of its own.
    in_vault_dir "$vault" identity create rust-app --user-assigned
    in_vault_dir "$vault" grant --identity rust-app --key-permissions list
    in_vault_dir "$vault" identity add-secret rust-app --secret-file "$1/rust-app.secret"
    CONFORMANCE_TENANT=$(clients_field "$vault" tenantId show)
    CONFORMANCE_CLIENT_ID=$(clients_field "$vault" clientId identity enable rust-app)
    CONFORMANCE_SECRET=$(cat "$1/rust-app.secret")
    export CONFORMANCE_TENANT CONFORMANCE_CLIENT_ID CONFORMANCE_SECRET AZURE_AUTHORITY_HOST=$CONFORMANCE_AUTHORITY
    clients_rust_run "$1" "$vault" vault && clients_rust_run "$1" "$hsm" mhsm
}

clients_rust_run() { # DIR VAULT WHAT
    IDENTITY_ENDPOINT=$(cat "$2/identity.url") IDENTITY_HEADER=$(cat "$2/identities/officer.header") \
        with_names "$target/debug/vault-conformance" "$3" >"$1/rust-$3.log" 2>&1 ||
        { tail -n 80 "$1/rust-$3.log" >&2 && return 1; }
    say "Rust: $(tail -n 1 "$1/rust-$3.log")"
}

clients_field() { # DIR FIELD VERB...
    local vault=$1 field=$2
    shift 2
    BYOKFS_VAULT=$vault "$byokfs" vault "$@" --json | sed -n "s/.*\"$field\": *\"\([^\"]*\)\".*/\1/p"
}
