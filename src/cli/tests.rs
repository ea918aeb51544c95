//! Lines that launchers write, and lines that make no sense.

use super::*;

fn parse(line: &str) -> Result<Cli, String> {
    let cli = Cli::try_parse_from(line.split_whitespace()).map_err(|error| error.to_string())?;
    match cli.check() {
        Ok(Task::Serve(cli)) => Ok(*cli),
        Ok(Task::Print(text)) => Err(text.to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

fn accepted(line: &str) -> Cli {
    parse(line).unwrap_or_else(|error| panic!("{line}: {error}"))
}

#[test]
fn definition_is_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn l1_kata_go() {
    let cli = accepted("rafsd virtiofs --log-level debug --apisock /a --sock /v");
    assert_eq!(cli.process.log_level, LogLevel::Debug);
    assert_eq!(cli.process.apisock.unwrap().to_str(), Some("/a"));
    assert_eq!(cli.virtiofs.sock.unwrap().to_str(), Some("/v"));
}

#[test]
fn l2_kata_runtime_rs() {
    assert!(
        accepted("rafsd virtiofs --hybrid-mode --log-level info --apisock /a --sock /v")
            .virtiofs
            .hybrid_mode
    );
}

#[test]
fn l3_rootless() {
    let cli = accepted(
        "rafsd virtiofs --hybrid-mode --log-level info --apisock nydusd-api.sock --sock virtiofsd.sock",
    );
    assert_eq!(cli.virtiofs.sock.unwrap().to_str(), Some("virtiofsd.sock"));
}

#[test]
fn l4_l5_l8_fuse() {
    let dedicated = "rafsd fuse --thread-num 10 --id i --config /c --bootstrap /b --mountpoint /m --apisock /a --log-level info \
        --log-rotation-size 100 --supervisor /s --log-file /l --prefetch-files /p --backend-source http://x --failover-policy resend";
    let shared = "rafsd fuse --upgrade --mountpoint /m --apisock /a --log-level info";
    let smoke = "rafsd --mountpoint /m --apisock /a --log-level error --thread-num 10 --config /c --bootstrap /b --dedup-db /d --writable";
    for line in [dedicated, shared, smoke] {
        let cli = accepted(line);
        assert!(cli.serves_fuse() && cli.fuse.mountpoint.is_some(), "{line}");
    }
    assert_eq!(accepted(smoke).fuse.fuse_threads, 10);
    for line in [
        "rafsd fuse",
        "rafsd fuse --mountpoint /m --sock /v",
        "rafsd virtiofs --sock /v --mountpoint /m",
        "rafsd fuse -M /m --fuse-threads 0",
    ] {
        assert!(parse(line).is_err(), "{line}");
    }
}

#[test]
fn l7_version_probe() {
    let text = parse("rafsd --version").unwrap_err();
    let commit = text
        .lines()
        .find_map(|line| line.strip_prefix("Git Commit: "))
        .unwrap();
    assert!(!commit.trim().is_empty());
}

#[test]
fn l9_without_subcommand() {
    let cli = accepted("rafsd --config /c --sock /v --bootstrap /b --log-level info");
    assert_eq!(cli.command, None);
    assert_eq!(cli.virtiofs.bootstrap.unwrap().to_str(), Some("/b"));
    accepted("rafsd --log-level info --sock /v --apisock /a");
}

#[test]
fn l10_extra_arguments_of_the_documentation() {
    let base = "rafsd virtiofs --log-level info --apisock /a --sock /v";
    assert_eq!(
        accepted(&format!("{base} --log-level debug")).process.log_level,
        LogLevel::Debug
    );
    let cli = accepted(&format!("{base} --threads 4"));
    assert_eq!(cli.without_effect(), ["--thread-pool-size"]);
}

#[test]
fn l11_default_extra_arguments() {
    let base = "rafsd virtiofs --log-level info --apisock /a --sock /v --thread-pool-size=1";
    assert!(
        accepted(&format!("{base} --announce-submounts"))
            .virtiofs
            .virtiofsd
            .announce_submounts
    );
    assert!(
        accepted(&format!("{base} -o announce_submounts"))
            .virtiofs
            .virtiofsd
            .announce_submounts
    );
}

#[test]
fn options_of_virtiofsd() {
    let cli = accepted(
        "rafsd --socket-path=/v --shared-dir /s --cache=never --sandbox chroot --xattr --seccomp=none --syslog -o x,cache=always",
    );
    assert_eq!(cli.virtiofs.virtiofsd.cache, Some(CacheMode::Always));
    assert_eq!(cli.without_effect(), ["--syslog", "-o x"]);
    assert_eq!(
        accepted("rafsd --fd=3 -o source=/s")
            .virtiofs
            .shared_dir
            .unwrap()
            .to_str(),
        Some("/s")
    );
    assert!(
        parse("rafsd --print-capabilities")
            .unwrap_err()
            .contains("\"fs\"")
    );
}

#[test]
fn options_stand_on_either_side_of_the_subcommand() {
    let cli = accepted("rafsd --apisock /a --log-level warn virtiofs --sock /v --log-level error");
    assert_eq!(cli.process.log_level, LogLevel::Error);
    assert_eq!(
        accepted("rafsd -l trace virtiofs --sock /v").process.log_level,
        LogLevel::Trace
    );
}

#[test]
fn addresses_for_metrics() {
    let of = |text| {
        accepted(&format!("rafsd --sock /v --metrics-address {text}"))
            .process
            .metrics_address
            .unwrap()
            .to_string()
    };
    assert_eq!(of("9477"), "127.0.0.1:9477");
    assert_eq!(of("10.0.0.1:9477"), "10.0.0.1:9477");
    assert_eq!(of("[::1]:9477"), "[::1]:9477");
    assert!(parse("rafsd --sock /v --metrics-address nonsense").is_err());
}

#[test]
fn bad_usage_is_refused() {
    for line in [
        "rafsd",
        "rafsd virtiofs",
        "rafsd virtiofs --sock /v --no-such-option",
        "rafsd virtiofs --sock /v --log-level loud",
        "rafsd virtiofs --sock /v --fd 3",
        "rafsd virtiofs --sock /v --id x",
        "rafsd virtiofs --sock /v --supervisor /s",
        "rafsd virtiofs --sock /v --bootstrap /b --shared-dir /s --config /c",
        "rafsd virtiofs --sock /v --bootstrap /b --localfs-dir /d --config /c",
        "rafsd virtiofs --sock /v --prefetch-files /p",
        "rafsd virtiofs --sock /v --request-queues 0",
        "rafsd virtiofs --sock /v -o cache=some",
        "rafsd virtiofs --sock /v --sandbox tight",
        "rafsd virtiofs --sock /v --inode-file-handles often",
        "rafsd virtiofs --sock /v --xattrmap :nonsense:",
        "rafsd virtiofs --sock /v --translate-uid map:0:1",
        "rafsd virtiofs --sock /v --seccomp maybe",
        "rafsd virtiofs --sock /v --modcaps +everything",
        "rafsd singleton --sock /v",
    ] {
        assert!(parse(line).is_err(), "{line}");
    }
}
