//! What this machine can do, and what its kernel says of a process.

use std::io::Write;
use std::process::Command;
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
pub fn skip(what: &str, why: &str) {
    writeln!(std::io::stderr(), "skipped: {what}, as {why}").expect("stderr");
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
