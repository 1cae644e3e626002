//! What 500 live tracks cost: the release server beside a floor that does the least any recorder must do.
//!
//! ```text
//! cargo bench --bench ingest -- [--tracks N] [--seconds S] [--short]
//! ```
//!
//! The same load runs at two sinks, one after the other, each a process of its own on this machine:
//!
//! - **floor** (`ingest/floor.rs`): one thread, one epoll loop; it reads frames, unmasks them and writes a WAV file per
//!   connection. No checks, no pings, no database, no coalescing. It is this executable, started again.
//! - **live-meeting**: `live-meeting serve` of the profile under test, with analysis off and open ingest.
//!
//! The load (`ingest/load.rs`) is LiveKit's: per track a masked binary message of 1,920 bytes each 10 ms, 48 kHz stereo, on an
//! absolute schedule, with the tracks spread over the 10 ms. The audio counts, so that a lost, doubled or swapped sample shows.
//!
//! The floor runs twice, and its first pass does not count: it makes the page cache warm. Without it, whichever sink ran first cost up
//! to half as much again as an identical one after it, and spent 37 % of its time in the kernel's `memset` of new pages (measured on a
//! virtual machine; most likely the host hands out memory at first touch and bills whoever touches it).
//!
//! How to read the table:
//!
//! - **CPU µs/s audio**: user and system time of all threads of the sink (`/proc/PID/stat`), divided by the seconds of audio
//!   streamed meanwhile. The window opens 1 s after the first frame, when all tracks are connected, and shuts before the first Close.
//!   1,000 means that one core carries 1,000 tracks. The absolute figure belongs to the machine; **ratio to floor** is what compares.
//! - **KiB/track**: growth of the resident memory (`VmRSS`) from before the first connection to the end of the window, per track.
//!   Written audio sits in the page cache and counts for neither sink.
//! - **bit-exact**: files whose header and every sample are right, read once the sink has answered all Closes (`ingest/recordings.rs`).
//! - **hashing**: the server's CPU time after the last Close until every sidecar has its SHA-256, per second of audio. Nobody waits for it, and it is
//!   not in the figure above.
//! - **p99 to the file**: the class of the server's histogram `write_lag_seconds` that holds 99 of 100 appends of the window: from the arrival of a frame to its write.
//! - **kill -9**: 20 tracks stream to a server of their own, which is killed; the loss is all that was sent by then, also what was under way, less what
//!   the file holds before any repair.
//! - **pauses, SIGTERM**: all tracks stream to a server of their own and say nothing for a second, all at once; then it is told to stop. What was due before the
//!   signal and is in no file is told, with how late the generator was in it.
//! - **lateness**: how far the load generator fell behind its schedule at worst. Above 1 s the figures are not valid, and it says so.
//!
//! Identical sinks came out within 7 % of each other on an idle machine (measured), and further apart when the cores had other work.
//! Figures are printed, not judged. The exit code is 1 when a file is not bit-exact or something failed to run. Linux only.

use std::env;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rustix::process::{Resource, Rlimit};

use crate::load::{Lateness, Pause};
use crate::process::SinkProcess;
use crate::recordings::Verdict;
use crate::scrape::Classes;
use crate::stop::Stopped;

#[path = "ingest/floor.rs"]
mod floor;
#[path = "ingest/kill.rs"]
mod kill;
#[path = "ingest/load.rs"]
mod load;
#[path = "ingest/process.rs"]
mod process;
#[path = "ingest/recordings.rs"]
mod recordings;
#[path = "ingest/scrape.rs"]
mod scrape;
#[path = "ingest/stop.rs"]
mod stop;

/// Hidden argument under which this executable becomes the floor; its value is the directory to write to.
const FLOOR_ARGUMENT: &str = "--floor-sink";
/// Hidden from nobody: it lives as long as the benchmark.
const ADMIN_KEY: &str = "bench-admin-key-0123456789";
const SERVER: &str = "live-meeting";
const WRITE_LAG: &str = "live_meeting_write_lag_seconds";
const HASH_DEADLINE: Duration = Duration::from_secs(120);
const WARM_UP: Duration = Duration::from_secs(1);
/// Past this lateness the sinks were not offered the load that the table claims.
const LATENESS_LIMIT: Duration = Duration::from_secs(1);
const TARGET_CPU_RATIO: f64 = 1.6;
const TARGET_KIB_PER_TRACK: f64 = 96.0;
const TARGET_LAG_MS: u64 = 250;
const TARGET_LOSS_MS: u64 = 250;

const USAGE: &str = "usage: cargo bench --bench ingest -- [--tracks N] [--seconds S] [--short]

  --tracks N   tracks that stream at once, 1 to 4000 (default 500)
  --seconds S  length of the measured window, 1 to 600 (default 15); the files take N × (S + 1) × 192 kB of disk
  --short      50 tracks for 4 seconds";

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let outcome = match arguments.as_slice() {
        [flag, directory] if flag == FLOOR_ARGUMENT => floor::run(Path::new(directory)).map(|()| true),
        [flag] if flag == "--help" || flag == "-h" => {
            println!("{USAGE}");
            Ok(true)
        }
        _ => Options::parse(&arguments).and_then(|options| compare(&options)),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

struct Options {
    tracks: u16,
    seconds: u16,
}

impl Options {
    const FULL: Self = Self { tracks: 500, seconds: 15 };
    const SHORT: Self = Self { tracks: 50, seconds: 4 };

    fn parse(arguments: &[String]) -> anyhow::Result<Self> {
        let is_bench = arguments.iter().any(|argument| argument == "--bench");
        let mut options = if is_bench { Self::FULL } else { Self::SHORT };
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            match argument.as_str() {
                "--bench" => {} // `cargo bench` adds it; `cargo test --all-targets` does not, and gets the short run
                "--short" => options = Self::SHORT,
                "--tracks" => options.tracks = number(argument, rest.next(), 1, load::MAX_TRACKS)?,
                "--seconds" => {
                    options.seconds = number(argument, rest.next(), 1, load::MAX_SECONDS)?;
                }
                unknown => bail!("unknown argument {unknown:?}\n\n{USAGE}"),
            }
        }
        Ok(options)
    }
}

fn number(name: &str, value: Option<&String>, least: u16, most: u16) -> anyhow::Result<u16> {
    let value = value.with_context(|| format!("{name} wants a number\n\n{USAGE}"))?;
    let parsed = u16::from_str(value).ok().filter(|parsed| (least..=most).contains(parsed));
    parsed.with_context(|| format!("{name} must be a number from {least} to {most}, not {value:?}"))
}

/// Measures both sinks and prints the comparison. `false`: not every file was bit-exact.
fn compare(options: &Options) -> anyhow::Result<bool> {
    raise_open_files_limit(options.tracks)?;
    let workspace = Workspace::create()?;
    let warm_up = measure("floor", options, &workspace, spawn_floor)?;
    let floor = measure("floor", options, &workspace, spawn_floor)?;
    let server = measure(SERVER, options, &workspace, spawn_server)?;
    let losses = kill::losses(&workspace.subdirectory("killed")?)?;
    let stopped = stop::measure(&workspace.subdirectory("stopped")?, options.tracks)?;

    print_table(options, &floor, &server);
    print_server(&server, &losses);
    print_stopped(options, &stopped);
    println!("\nwarm-up pass of the floor, not counted: {:.1} CPU µs/s audio", warm_up.cpu_micros_per_audio_second);
    Ok(floor.is_whole() && server.is_whole())
}

fn spawn_floor(directory: &Path) -> anyhow::Result<SinkProcess> {
    let mut command = Command::new(env::current_exe().context("cannot find this executable")?);
    command.arg(FLOOR_ARGUMENT).arg(directory);
    SinkProcess::spawn(command)
}

fn spawn_server(directory: &Path) -> anyhow::Result<SinkProcess> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_live-meeting"));
    command.arg("serve").current_dir(directory);
    // The caller's environment may name a database, a LiveKit or a Hume: the benchmark measures the defaults.
    command.env_clear();
    command.envs(["PATH", "LD_LIBRARY_PATH"].into_iter().filter_map(|name| Some((name, env::var_os(name)?))));
    command.envs([
        ("HOST", "127.0.0.1"),
        ("PORT", "0"),
        ("LIVE_MEETING__INGEST__AUTH", "open"),
        ("LIVE_MEETING__ANALYSIS__ENABLED", "false"),
        ("ADMIN_API_KEY", ADMIN_KEY),
        ("RUST_LOG", "warn,live_meeting=info"),
    ]);
    SinkProcess::spawn(command)
}

/// One sink's row in the table, and what went wrong.
struct Measurement {
    name: &'static str,
    cpu_micros_per_audio_second: f64,
    kib_per_track: f64,
    verdict: Verdict,
    lateness: Lateness,
    slowest_close: Duration,
    faults: Vec<String>,
    /// What only the server has.
    after: Option<After>,
}

/// What the server says and does once the load has ended.
struct After {
    /// The bound of the histogram's class that holds 99 of 100; `None` above the last bound.
    lag_p99_ms: Option<u64>,
    hash_micros_per_audio_second: f64,
    hashed_after: Duration,
}

impl Measurement {
    fn is_whole(&self) -> bool {
        self.faults.is_empty() && self.verdict.exact == self.verdict.expected
    }
}

fn measure(
    name: &'static str,
    options: &Options,
    workspace: &Workspace,
    spawn: impl FnOnce(&Path) -> anyhow::Result<SinkProcess>,
) -> anyhow::Result<Measurement> {
    let directory = workspace.subdirectory(name)?;
    let mut sink = spawn(&directory).with_context(|| format!("cannot start {name}"))?;
    let measured = stream(name, options, &directory, &sink);
    let failed = measured.as_ref().map_or(true, |measurement| !measurement.is_whole());
    if let Some(complaint) = sink.stop()? {
        eprintln!("{name}: {complaint}");
    }
    if failed {
        eprintln!("{name}: the last lines of its log:\n{}", sink.log_tail());
    }
    // 500 tracks leave 1.5 GB: the next sink gets the disk and the page cache back.
    fs::remove_dir_all(&directory).with_context(|| format!("cannot remove {}", directory.display()))?;
    measured.with_context(|| format!("{name} could not be measured"))
}

fn stream(name: &'static str, options: &Options, directory: &Path, sink: &SinkProcess) -> anyhow::Result<Measurement> {
    let address: SocketAddr = sink.address();
    let window = Duration::from_secs(options.seconds.into());
    let chunks_per_track = load::chunks_in(WARM_UP + window);

    eprintln!("{name}: connecting {} tracks to {address}", options.tracks);
    let idle_kib = sink.resident_kib()?;
    let connections = load::connect(address, options.tracks)?;

    eprintln!("{name}: streaming for {} s", (WARM_UP + window).as_secs());
    let streaming = load::start(connections, chunks_per_track, Pause::default())?;
    sleep_until(streaming.started_at() + WARM_UP);
    let lags = || if name == SERVER { Classes::read(address, WRITE_LAG) } else { Ok(Classes::default()) };
    let lags_before = lags()?;
    let (opened_at, cpu_before) = (Instant::now(), sink.cpu_time()?);
    sleep_until(streaming.started_at() + WARM_UP + window);
    let (lasted, cpu_after) = (opened_at.elapsed(), sink.cpu_time()?);
    let busy_kib = sink.resident_kib()?;
    let lag_p99_ms = lags()?.p99_ms_since(&lags_before);
    let streamed = streaming.finish()?;
    let after = if name == SERVER { Some(After { lag_p99_ms, ..after(options, directory, sink)? }) } else { None };

    eprintln!("{name}: comparing {} files", options.tracks);
    let verdict = recordings::check(directory, options.tracks, chunks_per_track)?;

    let audio_seconds = lasted.as_secs_f64() * f64::from(options.tracks);
    Ok(Measurement {
        name,
        cpu_micros_per_audio_second: cpu_after.saturating_sub(cpu_before).as_secs_f64() * 1e6 / audio_seconds,
        kib_per_track: (f64::from(busy_kib) - f64::from(idle_kib)) / f64::from(options.tracks),
        verdict,
        lateness: streamed.lateness,
        slowest_close: streamed.slowest_close,
        faults: streamed.faults,
        after,
    })
}

fn after(options: &Options, directory: &Path, sink: &SinkProcess) -> anyhow::Result<After> {
    let (closed_at, cpu_before) = (Instant::now(), sink.cpu_time()?);
    while recordings::hashed(directory)? < usize::from(options.tracks) {
        ensure!(closed_at.elapsed() < HASH_DEADLINE, "not every file was hashed within {HASH_DEADLINE:?}");
        thread::sleep(Duration::from_millis(100));
    }
    let (hashed_after, cpu_after) = (closed_at.elapsed(), sink.cpu_time()?);
    let audio_seconds = (WARM_UP.as_secs_f64() + f64::from(options.seconds)) * f64::from(options.tracks);
    let hash_micros_per_audio_second = cpu_after.saturating_sub(cpu_before).as_secs_f64() * 1e6 / audio_seconds;
    Ok(After { lag_p99_ms: None, hash_micros_per_audio_second, hashed_after })
}

fn print_table(options: &Options, floor: &Measurement, server: &Measurement) {
    let ratio = server.cpu_micros_per_audio_second / floor.cpu_micros_per_audio_second;
    println!(
        "\n{:<12}  {:>6}  {:>7}  {:>14}  {:>14}  {:>9}  {:>9}  {:>9}",
        "sink", "tracks", "seconds", "CPU µs/s audio", "ratio to floor", "KiB/track", "bit-exact", "lateness"
    );
    for (row, ratio) in [(floor, 1.0), (server, ratio)] {
        println!(
            "{:<12}  {:>6}  {:>7}  {:>14.1}  {:>13.2}×  {:>9.1}  {:>9}  {:>6.1} ms",
            row.name,
            options.tracks,
            options.seconds,
            row.cpu_micros_per_audio_second,
            ratio,
            row.kib_per_track,
            format!("{}/{}", row.verdict.exact, row.verdict.expected),
            row.lateness.worst.as_secs_f64() * 1e3,
        );
    }
    println!();
    for row in [floor, server] {
        let mean = row.lateness.mean().as_secs_f64() * 1e3;
        let close = row.slowest_close.as_secs_f64() * 1e3;
        println!("{}: mean lateness {mean:.2} ms, all {} Closes answered after {close:.0} ms", row.name, options.tracks);
        if row.lateness.worst > LATENESS_LIMIT {
            println!("{}: NOT VALID: the load generator fell more than {LATENESS_LIMIT:?} behind its schedule", row.name);
        }
        if let Some(difference) = &row.verdict.first_difference {
            println!("{}: first difference: {difference}", row.name);
        }
        if let [first, rest @ ..] = row.faults.as_slice() {
            println!("{}: {first} ({} more such faults)", row.name, rest.len());
        }
    }

    println!();
    target("≤1.6× floor CPU", format!("{ratio:.2}×"), ratio <= TARGET_CPU_RATIO);
    target("≤96 KiB per track", format!("{:.1} KiB", server.kib_per_track), server.kib_per_track <= TARGET_KIB_PER_TRACK);
    target("nothing lost", format!("{} of {} files bit-exact", server.verdict.exact, server.verdict.expected), server.is_whole());
}

fn print_server(server: &Measurement, losses: &[Duration]) {
    if let Some(After { lag_p99_ms, hash_micros_per_audio_second, hashed_after }) = &server.after {
        let class = lag_p99_ms.map_or("above every class".to_owned(), |bound| format!("at most {bound} ms"));
        target("p99 from arrival to the file ≤250 ms", class, lag_p99_ms.is_some_and(|bound| bound <= TARGET_LAG_MS));
        println!("hashing, apart: {hash_micros_per_audio_second:.1} CPU µs/s audio, done {:.1} s after the last Close", hashed_after.as_secs_f64());
    }
    let worst = losses.iter().max().copied().unwrap_or_default();
    let median = losses.get(losses.len() / 2).copied().unwrap_or_default();
    let figure = format!("at most {} ms, {} ms in the middle, of {} tracks", worst.as_millis(), median.as_millis(), losses.len());
    target("a kill -9 loses ≤250 ms", figure, worst <= Duration::from_millis(TARGET_LOSS_MS));
}

fn print_stopped(options: &Options, Stopped { lag_p99_ms, filled, took, complaint, sealed, missing }: &Stopped) {
    let class = lag_p99_ms.map_or("above every class".to_owned(), |bound| format!("at most {bound} ms"));
    println!("p99 from arrival to the file while the pauses of all tracks are filled at once: {class}, {filled} of {} filled", options.tracks);
    let figure =
        format!("{:.1} s, {sealed} of {} sealed, at most {} ms of what was due missing", took.as_secs_f64(), options.tracks, missing.as_millis());
    target("a SIGTERM amid all of them ends within 10 s", figure, complaint.is_none() && *sealed == usize::from(options.tracks));
    if let Some(complaint) = complaint {
        println!("{SERVER}: {complaint}");
    }
}

fn target(claim: &str, figure: String, is_met: bool) {
    println!("target: {claim}: {figure}: {}", if is_met { "met" } else { "missed" });
}

fn sleep_until(moment: Instant) {
    thread::sleep(moment.saturating_duration_since(Instant::now()));
}

/// Raises the soft limit to the hard one; the sinks inherit it.
fn raise_open_files_limit(tracks: u16) -> anyhow::Result<()> {
    let hard = rustix::process::getrlimit(Resource::Nofile).maximum;
    rustix::process::setrlimit(Resource::Nofile, Rlimit { current: hard, maximum: hard }).context("cannot raise the limit of open files")?;
    // A sink holds a socket and a file for each track.
    let needed = u64::from(tracks) * 2 + 100;
    ensure!(hard.is_none_or(|hard| hard >= needed), "{tracks} tracks need {needed} open files, the hard limit is {}", hard.unwrap_or_default());
    Ok(())
}

/// A directory in the target directory that goes when this is dropped.
struct Workspace {
    path: PathBuf,
}

impl Workspace {
    const PREFIX: &str = "ingest-bench-";

    fn create() -> anyhow::Result<Self> {
        let parent = Path::new(env!("CARGO_TARGET_TMPDIR"));
        Self::remove_leftovers(parent)?;
        let path = parent.join(format!("{}{}", Self::PREFIX, std::process::id()));
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self { path })
    }

    /// A run that was interrupted with Ctrl-C left its gigabytes behind.
    fn remove_leftovers(parent: &Path) -> anyhow::Result<()> {
        let Ok(entries) = fs::read_dir(parent) else {
            return Ok(()); // not made yet
        };
        for entry in entries {
            let entry = entry.context("cannot list the temporary directory")?;
            let name = entry.file_name();
            let pid = name.to_str().and_then(|name| name.strip_prefix(Self::PREFIX));
            if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
                fs::remove_dir_all(entry.path()).with_context(|| format!("cannot remove {}", entry.path().display()))?;
            }
        }
        Ok(())
    }

    fn subdirectory(&self, name: &str) -> anyhow::Result<PathBuf> {
        let path = self.path.join(name);
        fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(path)
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            eprintln!("cannot remove {}: {error}", self.path.display());
        }
    }
}
