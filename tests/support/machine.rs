//! What this machine can do, and what its kernel says of a process.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

/// Whether all of these programs are here. Else a line says what is left out for want of them, also where tests are not asked to talk.
pub fn has_tools(what: &str, tools: &[&str]) -> bool {
    let missing: Vec<&str> = tools.iter().copied().filter(|tool| !is_program(tool)).collect();
    if !missing.is_empty() {
        skip(what, &format!("{} is missing", missing.join(" and ")));
    }
    missing.is_empty()
}

/// Says that a test, or a part of one, cannot be done here.
///
/// Where `CI=true`, everything is to be done: then it fails, unless `TESTS_MAY_SKIP` has `what` among its names, which commas part.
#[track_caller]
pub fn skip(what: &str, why: &str) {
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    let may = variable("CI") != "true" || variable("TESTS_MAY_SKIP").split(',').any(|name| name.trim() == what);
    assert!(may, "CI may not skip this: {what}, as {why} (a machine that cannot do it has TESTS_MAY_SKIP={what:?})");
    say(&format!("skipped: {what}, as {why}"));
}

/// Says a line, once, also where tests are not asked to talk: what is printed, their harness keeps to itself.
pub fn say(line: &str) {
    static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    if SAID.lock().expect("nobody panics here").insert(line.to_owned()) {
        writeln!(std::io::stderr(), "{line}").expect("stderr");
    }
}

pub fn is_program(name: &str) -> bool {
    std::env::var_os("PATH").is_some_and(|path| std::env::split_paths(&path).any(|directory| directory.join(name).is_file()))
}

/// Runs a program to its end; its standard output, or all it said if it failed.
pub fn output(command: &mut Command) -> Result<Vec<u8>, String> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    let said = || format!("{command:?}: {}: {}{}", output.status, String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if output.status.success() { Ok(output.stdout) } else { Err(said()) }
}

/// A file's hash, as another program says it; empty of one that is gone meanwhile.
pub fn sha256sum(path: &Path) -> String {
    let said = Command::new("sha256sum").arg(path).output().expect("sha256sum runs").stdout;
    String::from_utf8(said).expect("text").split(' ').next().unwrap_or_default().to_owned()
}

/// A number from the environment, for runs by hand.
pub fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().unwrap_or_else(|_| panic!("{name} must be a number, not {value:?}")))
}

/// Resident memory of a process (proc(5)).
pub fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the process runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
    line.trim().trim_end_matches(" kB").parse().expect("a number of kB")
}

/// User and system time of all threads of a process, to the clock tick.
pub fn cpu_time(pid: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("the process runs");
    // The command's name, in parentheses, may hold blanks; utime and stime are the 12th and 13th field behind it (proc(5)).
    let (_, fields) = stat.rsplit_once(')').expect("a command name");
    let ticks: u64 = fields.split_whitespace().skip(11).take(2).map(|field| field.parse::<u64>().expect("ticks")).sum();
    Duration::from_millis(ticks * 1_000 / rustix::param::clock_ticks_per_second())
}

/// How many descriptors a process has open.
pub fn descriptors(pid: u32) -> u64 {
    std::fs::read_dir(format!("/proc/{pid}/fd")).expect("the process runs").count() as u64
}
