use super::*;

fn parse(text: &str) -> Result<Config> {
    Config::parse(text, Path::new("t.toml"), &[])
}

fn error(text: &str) -> String {
    let error = parse(text).unwrap_err();
    assert_eq!(error.kind, Kind::Config);
    error.to_string()
}

fn over(section: &str, key: &str, value: &str) -> Override {
    Override {
        section: section.into(),
        key: key.into(),
        value: value.into(),
        origin: "flag".into(),
    }
}

#[test]
fn the_shipped_file_shows_every_default() {
    let shipped = include_str!("../../config/byokfs.toml");
    assert_eq!(parse(shipped).unwrap(), Config::default());
    let shown: toml::Table = toml::from_str(shipped).unwrap();
    let every = toml::Table::try_from(Config::default()).unwrap();
    assert_eq!(shown, every);
}

#[test]
fn unknown_keys_are_refused_with_their_line() {
    let message = error("[watcher]\ninterval = \"30s\"\nintervall = \"5s\"\n");
    assert!(message.starts_with("t.toml:3: intervall: unknown field `intervall`"), "{message}");
    assert!(error("[wacher]\n").starts_with("t.toml:1: unknown field `wacher`"));
}

#[test]
fn bad_units_are_refused_with_their_line() {
    let message = error("[fence]\n\ntimeout = \"20\"\n");
    assert!(message.starts_with("t.toml:3: timeout: \"20\" is not a duration"), "{message}");
    assert!(error("[fence]\ntimeout = 20\n").starts_with("t.toml:2: timeout: invalid type"));
    assert!(error("[mount]\nerrno = \"enokey\"\n").contains("unknown variant `enokey`"));
}

#[test]
fn contradictions_are_refused() {
    for (text, part) in [
        (
            "[watcher]\nmax_staleness = \"29s\"\ninterval = \"1s\"\n\
             [fence]\nenabled = true\nsocket = \"/s\"",
            "watcher.deadline + fence.timeout (32s)",
        ),
        ("[watcher]\nmax_staleness = \"11m\"", "within 10m"),
        ("[watcher]\ninterval = \"10m\"", "is too short"),
        ("[watcher]\ninterval = \"0s\"", "watcher.interval is 0s"),
        ("[watcher]\nconfirm_after = \"2m\"", "watcher.confirm_after"),
        ("[fence]\nenabled = true", "needs fence.socket or fence.pid_file"),
        ("[fence]\ntimeout = \"10ms\"", "fence.timeout is 10ms"),
        ("[run]\ndir = \"run\"", "run.dir \"run\" is not an absolute path"),
        ("[key]\nidentity_endpoint = \"ftp://x/\"", "not an http(s) URL"),
        ("[mount]\nthreads = 9999", "mount.threads"),
        ("[key]\nauthority = \"login.example\"", "key.authority"),
        ("[key]\nidentity = \"client-secret\"", "needs key.client_secret_file"),
        ("[key]\nidentity = \"client-certificate\"", "needs key.client_certificate_file"),
        (
            "[key]\nidentity = \"client-secret\"\nclient_secret_file = \"secret\"",
            "key.client_secret_file \"secret\" is not an absolute path",
        ),
    ] {
        let message = error(text);
        assert!(message.contains(part), "{text}: {message}");
    }
}

#[test]
fn later_sources_override_and_name_themselves() {
    let flags = [over("mount", "threads", "4"), over("fence", "socket", "/run/m.sock")];
    let config = Config::parse("[mount]\nthreads = 2\n", Path::new("t.toml"), &flags).unwrap();
    assert_eq!(config.mount.threads, 4);
    assert_eq!(config.fence.socket, Some("/run/m.sock".into()));
    let wrong = Config::parse("", Path::new("t.toml"), &[over("mount", "thread", "4")]);
    assert!(wrong.unwrap_err().to_string().starts_with("flag: unknown field `thread`"));
}

#[test]
fn variables_name_section_and_key() {
    let vars = [
        ("BYOKFS_WATCHER_CONFIRM_AFTER", "2s"),
        ("BYOKFS_CONFIG", "/x"),
        ("BYOKFS_VAULT", "/y"),
        ("PATH", "/bin"),
    ];
    let found =
        from_variables(vars.iter().map(|(name, value)| ((*name).into(), (*value).into()))).unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].section.as_str(), found[0].key.as_str()), ("watcher", "confirm_after"));
}
