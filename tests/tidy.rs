//! House rules that a machine can check.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every Rust file below a directory, with its path relative to the root.
fn sources(dir: &str) -> Vec<(String, String)> {
    let mut files = Vec::new();
    let mut open: Vec<PathBuf> = vec![root().join(dir)];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|kind| kind == "rs") {
                let name = path.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
                files.push((name, std::fs::read_to_string(path).unwrap()));
            }
        }
    }
    assert!(!files.is_empty());
    files.sort();
    files
}

/// A file without its inline tests.
fn without_tests(text: &str) -> &str {
    text.split_once("#[cfg(test)]\nmod tests {").map_or(text, |(code, _)| code)
}

/// Lines of code that mention a crate by path or import.
fn mentions(text: &str, name: &str) -> bool {
    let code = without_tests(text).lines().filter(|line| !line.trim_start().starts_with("//"));
    code.into_iter().any(|line| line.contains(&format!("{name}::")) || line.contains(&format!("use {name};")))
}

#[test]
fn each_crate_is_named_in_its_own_place_only() {
    let rules: [(&str, &[&str]); 9] = [
        ("diesel", &["src/db/"]),
        ("diesel_async", &["src/db/"]),
        ("livekit_api", &["src/livekit/"]),
        ("livekit_protocol", &["src/livekit/"]),
        ("hound", &["src/analysis/", "src/cli/"]),
        ("awc", &["src/analysis/", "src/cli/"]),
        ("actix_web_actors", &["src/http/egress_socket.rs", "src/http/video_socket.rs"]),
        ("rubato", &["src/audio/resample.rs"]),
        ("rustls", &["src/analysis/"]),
    ];
    for (name, text) in sources("src").into_iter().filter(|(name, _)| !name.ends_with("/tests.rs")) {
        for (krate, places) in rules {
            let allowed = places.iter().any(|place| name.starts_with(place));
            assert!(allowed || !mentions(&text, krate), "{name} uses {krate}, which belongs in {places:?}");
        }
    }
}

#[test]
fn pure_modules_stay_pure() {
    for (name, text) in
        sources("src").into_iter().filter(|(name, _)| ["src/audio/", "src/session/", "src/video/"].iter().any(|pure| name.starts_with(pure)))
    {
        for impure in
            ["Instant::now", "SystemTime::now", "Utc::now", "std::fs", "actix", "tokio", "log::", "crate::db", "crate::http", "crate::actors"]
        {
            assert!(!without_tests(&text).contains(impure), "{name} is pure, but names {impure}");
        }
    }
}

#[test]
fn dependencies_point_one_way() {
    let rules = [
        ("src/actors/", &["crate::http", "crate::cli", "crate::app"][..]),
        ("src/recording/", &["crate::http", "crate::actors", "crate::db", "crate::cli"]),
        ("src/analysis/", &["crate::http", "crate::actors", "crate::db", "crate::cli"]),
        ("src/livekit/", &["crate::http", "crate::actors", "crate::db", "crate::cli"]),
        ("src/db/", &["crate::http", "crate::actors", "crate::recording", "crate::cli"]),
    ];
    for (name, text) in sources("src") {
        for (place, forbidden) in rules {
            for upward in forbidden.iter().filter(|_| name.starts_with(place)) {
                assert!(!without_tests(&text).contains(upward), "{name} reaches up to {upward}");
            }
        }
    }
}

#[test]
fn no_message_is_thrown_over_the_wall() {
    let uses: Vec<String> = sources("src")
        .into_iter()
        .filter(|(name, _)| !name.ends_with("/tests.rs"))
        .flat_map(|(name, text)| without_tests(&text).matches(".do_send(").map(|_| name.clone()).collect::<Vec<_>>())
        .collect();
    assert_eq!(uses, ["src/http/egress_socket.rs", "src/http/video_socket.rs"], "the last word of a dying adapter, and nothing else");
}

#[test]
fn files_stay_readable_in_one_go() {
    for (name, text) in ["src", "tests", "benches"].into_iter().flat_map(sources) {
        let limit = if name.starts_with("src/") && !name.ends_with("/tests.rs") { 400 } else { 450 };
        let lines = without_tests(&text).lines().filter(|line| !line.trim().is_empty()).count();
        assert!(lines <= limit, "{name} has {lines} lines");
    }
}

#[test]
fn unfinished_work_and_silenced_lints_are_not_kept() {
    for (name, text) in sources("src") {
        let code = without_tests(&text);
        for mark in ["todo!(", "unimplemented!(", "TODO", "FIXME", "#[allow("] {
            assert!(!code.contains(mark), "{name} has {mark}");
        }
    }
    let tests = ["src", "tests"].into_iter().flat_map(sources).filter(|(name, _)| !name.ends_with("tidy.rs"));
    for (name, text) in tests {
        assert!(!text.contains("#[ignore"), "{name} has a test that never runs");
    }
}

#[test]
fn every_fault_of_the_table_has_the_tests_that_it_names() {
    let page = std::fs::read_to_string(root().join("docs/testing.md")).unwrap();
    let table = page.split("## ").find(|part| part.starts_with("Faults")).expect("the table of faults");
    let is_name = |text: &str| text.contains('_') && text.chars().all(|char| char.is_ascii_lowercase() || char.is_ascii_digit() || char == '_');
    let named: Vec<&str> =
        table.lines().filter(|line| line.starts_with("| ")).flat_map(|line| line.split('`')).filter(|text| is_name(text)).collect();
    assert!(named.len() > 40, "{named:?}");
    let all: String = ["src", "tests"].into_iter().flat_map(sources).map(|(_, text)| text).collect();
    let is_there = |name: &str| [format!("fn {name}("), format!(" {name}: super::")].iter().any(|line| all.contains(line));
    let missing: Vec<&str> = named.into_iter().filter(|name| !is_there(name)).collect();
    assert_eq!(missing, [""; 0]);
}

#[test]
fn every_dependency_is_listed_with_its_licence() {
    let manifest: toml::Table = std::fs::read_to_string(root().join("Cargo.toml")).unwrap().parse().unwrap();
    let names = |section: &str| manifest[section].as_table().unwrap().keys().cloned().collect::<BTreeSet<String>>();
    let used: BTreeSet<String> = names("dependencies").union(&names("dev-dependencies")).cloned().collect();
    let page = std::fs::read_to_string(root().join("docs/DEPENDENCIES.md")).unwrap();
    let rows = page.lines().filter_map(|line| line.strip_prefix("| ")?.split(" | ").map(str::to_owned).collect::<Vec<_>>().into());
    let listed: BTreeSet<String> =
        rows.filter(|row| row.len() == 3 && !row[1].starts_with("licence") && row[0] != "---").map(|row| row[0].clone()).collect();
    assert_eq!(listed, used);
}

#[test]
fn the_readme_names_every_route_and_every_command() {
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    let routes = std::fs::read_to_string(root().join("src/http/api/mod.rs")).unwrap();
    let paths: Vec<&str> = routes.split("resource(\"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
    assert!(paths.len() >= 10, "{paths:?}");
    for path in paths {
        assert!(readme.contains(&format!(" {path}")), "README.md does not name {path}");
    }
    for command in ["serve", "demo", "replay", "ticket", "check", "repair"] {
        assert!(readme.contains(command));
    }
}
