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
fn the_shipped_files_example_of_a_service_holds() {
    let shipped = include_str!("../../config/byokfs.toml");
    let (_, example) = shipped.split_once("# [[service]]\n").unwrap();
    let lines = example.lines().map_while(|line| line.strip_prefix("# "));
    let example = format!("[[service]]\n{}", lines.collect::<Vec<_>>().join("\n"));
    let config = parse(&example).unwrap();
    let key = config.key_for("https://kv-new.vault.azure.net/keys/kek");
    assert_eq!((key.identity, key.region.as_deref()), (Identity::Imds, Some("northeurope")));
}

#[test]
fn each_key_has_the_section_that_fits_it_closest() {
    let text = "[key]\nregion = \"of the rest\"\n\
                [[service]]\nkeys = \"https://kv1.example/\"\nregion = \"of kv1\"\n\
                [[service]]\nkeys = \"https://kv1.example/keys/special\"\nregion = \"of one key\"\n\
                [[service]]\nregion = \"of tokens\"\nkeys = \"pkcs11:\"\n\
                [[service]]\nkeys = \"pkcs11:token=main\"\nregion = \"of main\"\n";
    let config = parse(text).unwrap();
    for (kid, region) in [
        ("https://kv1.example/keys/kek", "of kv1"),
        ("https://kv1.example:443/keys/Special/0123", "of one key"),
        ("https://kv1.example.evil/keys/special", "of the rest"),
        ("https://kv2.example/keys/special", "of the rest"),
        ("pkcs11:token=other;object=kek", "of tokens"),
        ("pkcs11:token=main;object=kek;id=%01", "of main"),
        ("nonsense", "of the rest"),
    ] {
        assert_eq!(config.key_for(kid).region.as_deref(), Some(region), "{kid}");
    }
    // As the guard and the daemon are handed it.
    let line = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<Config>(&line).unwrap(), config);
    assert_eq!(parse(&toml::to_string(&config).unwrap()).unwrap(), config);
}

#[test]
fn bad_services_are_refused() {
    let section = |more: &str| format!("[[service]]\nkeys = \"https://kv1.example/\"\n{more}");
    for (text, part) in [
        (section("identty = \"imds\"\n"), "t.toml:3: identty: unknown field `identty`"),
        (section("identity = \"nobody\"\n"), "t.toml:3: identity: unknown variant `nobody`"),
        ("[[service]]\nidentity = \"imds\"\n".into(), "missing field `keys`"),
        ("[[service]]\nkeys = \"kv1\"\n".into(), "t.toml:2: keys: \"kv1\" is not the beginning"),
        ("[[service]]\nkeys = 7\n".into(), "t.toml:2: keys: invalid type"),
        ("[service]\nkeys = \"pkcs11:\"\n".into(), "t.toml:1: invalid type: map"),
        (
            section("") + &section("").replace("kv1.example/", "KV1.example:443/keys"),
            "for the same keys: \"https://kv1.example/\" and \"https://KV1.example:443/keys\"",
        ),
        (
            section("identity = \"client-secret\"\n"),
            "needs service \"https://kv1.example/\": client_secret_file",
        ),
        (section("ca_file = \"ca.pem\"\n"), "ca_file \"ca.pem\" is not an absolute path"),
        (section("authority = \"ftp://x\"\n"), "is not an http(s) URL"),
    ] {
        let message = error(&text);
        assert!(message.contains(part), "{text}: {message}");
    }
    let wrong = Config::parse("", Path::new("t.toml"), &[over("service", "keys", "pkcs11:")]);
    assert!(wrong.unwrap_err().to_string().contains("flag"));
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
fn a_fence_that_is_told_of_its_server_is_on() {
    let enabled = |text: &str| {
        let text = format!("[fence]\n{text}");
        Config::parse(&text, Path::new("t.toml"), &[]).unwrap().fence.enabled
    };
    assert!(enabled("socket = \"/s\""));
    assert!(enabled("pid_file = \"/p\""));
    assert!(!enabled("socket = \"/s\"\nenabled = false"));
    assert!(!enabled("socket = \"\"\noption_file = \"/o\""));
}

/// Who asks after a mount has the file, and not the mount's options.
#[test]
fn a_fence_whose_server_a_mount_option_names_is_refused_to_mounts_alone() {
    let text = "[fence]\nenabled = true\n";
    let server = |flags: &[Override]| {
        Config::parse(text, Path::new("t.toml"), flags).unwrap().expect_server_of_fence()
    };
    let message = server(&[]).unwrap_err().to_string();
    assert!(message.contains("needs fence.socket or fence.pid_file"), "{message}");
    server(&[over("fence", "socket", "/run/m.sock")]).unwrap();
    server(&[over("fence", "pid_file", "/run/m.pid")]).unwrap();
}

#[test]
fn later_sources_override_and_name_themselves() {
    let flags = [over("mount", "threads", "4"), over("fence", "socket", "/run/m.sock")];
    let config = Config::parse("[mount]\nthreads = 2\n", Path::new("t.toml"), &flags).unwrap();
    assert_eq!(config.mount.threads, 4);
    assert_eq!(config.fence.socket, Some("/run/m.sock".into()));
    assert!(config.fence.enabled);
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
