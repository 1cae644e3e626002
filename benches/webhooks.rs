//! How long LiveKit waits for a webhook's answer: the release server beside a floor that only reads the body.
//!
//! ```text
//! cargo bench --bench webhooks -- [--rate N] [--seconds S] [--short]
//! ```
//!
//! The load (`webhooks/load.rs`) is signed webhooks of 20 rooms whose participants join, publish, unpublish and leave, with a room's next life after ten of
//! them. It is an open loop: each event has its time, whatever became of those before, and **an answer's time is measured from when the event was due**. So
//! a server that stalls pays for everything that was due meanwhile. The events go over 128 connections that are kept alive, and were signed before.
//!
//! Sinks, each a process of its own on this machine, with the same load:
//!
//! - **floor**: an actix-web handler that reads the body and answers 204. No signature, no database.
//! - **live-meeting, SQLite**: `live-meeting serve` of the profile under test with its defaults, 200 events a second. A commit is a sync of the disk.
//! - **live-meeting, PostgreSQL**: the same in a database of its own on the server that `TEST_POSTGRES_URL` names, 1,000 events a second. What that server
//!   does at a commit is printed with it: the one of `.ci/postgres` syncs nothing.
//!
//! **lateness** is how far the load generator fell behind its schedule at worst while a connection was free: it is part of the answers' times. **kept** is the
//! events that the database has as applied once the server has stopped, beside the number of 204s: the exit code is 1 when they differ, or when anything
//! but a 204 was answered. Figures are printed, not judged. Linux only.

use std::env;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::database::Database;
use crate::load::Answers;
use crate::process::SinkProcess;

#[path = "webhooks/database.rs"]
mod database;
#[path = "webhooks/load.rs"]
mod load;
#[path = "ingest/process.rs"]
mod process;

/// Hidden argument under which this executable becomes the floor.
const FLOOR_ARGUMENT: &str = "--floor-sink";
const SQLITE_RATE: u32 = 200;
const POSTGRES_RATE: u32 = 1_000;
const TARGET_P99: Duration = Duration::from_millis(100);

const USAGE: &str = "usage: cargo bench --bench webhooks -- [--rate N] [--seconds S] [--short]

  --rate N     events a second, 1 to 20000 (default 200 on SQLite and 1000 on PostgreSQL)
  --seconds S  1 to 240 (default 20)
  --short      3 seconds";

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let outcome = match arguments.as_slice() {
        [flag] if flag == FLOOR_ARGUMENT => floor().map(|()| true),
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
    /// `None`: each engine's own.
    rate: Option<u32>,
    seconds: u32,
}

impl Options {
    const FULL_SECONDS: u32 = 20;
    const SHORT_SECONDS: u32 = 3;

    fn parse(arguments: &[String]) -> anyhow::Result<Self> {
        let is_bench = arguments.iter().any(|argument| argument == "--bench");
        let mut options = Self { rate: None, seconds: if is_bench { Self::FULL_SECONDS } else { Self::SHORT_SECONDS } };
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            match argument.as_str() {
                "--bench" => {} // `cargo bench` adds it; `cargo test --all-targets` does not, and gets the short run
                "--short" => options.seconds = Self::SHORT_SECONDS,
                "--rate" => options.rate = Some(number(argument, rest.next(), 20_000)?),
                // LiveKit's tokens are good for five minutes.
                "--seconds" => options.seconds = number(argument, rest.next(), 240)?,
                unknown => bail!("unknown argument {unknown:?}\n\n{USAGE}"),
            }
        }
        Ok(options)
    }
}

fn number(name: &str, value: Option<&String>, most: u32) -> anyhow::Result<u32> {
    let value = value.with_context(|| format!("{name} wants a number\n\n{USAGE}"))?;
    let parsed = u32::from_str(value).ok().filter(|parsed| (1..=most).contains(parsed));
    parsed.with_context(|| format!("{name} must be a number from 1 to {most}, not {value:?}"))
}

/// Measures every sink and prints the comparison. `false`: something was refused or lost.
fn compare(options: &Options) -> anyhow::Result<bool> {
    let workspace = Workspace::create()?;
    let mut rows = Vec::new();
    let sqlite_rate = options.rate.unwrap_or(SQLITE_RATE);
    rows.push(measure("floor", sqlite_rate, options, spawn_floor, None)?);
    let database = Database::sqlite(&workspace.path);
    rows.push(measure("SQLite", sqlite_rate, options, || spawn_server(&workspace.path, &database), Some(&database))?);
    match env::var("TEST_POSTGRES_URL") {
        Ok(url) => {
            let rate = options.rate.unwrap_or(POSTGRES_RATE);
            if rate != sqlite_rate {
                rows.push(measure("floor", rate, options, spawn_floor, None)?);
            }
            let database = Database::postgres(&url)?;
            println!("PostgreSQL: {}", database.durability()?);
            rows.push(measure("PostgreSQL", rate, options, || spawn_server(&workspace.path, &database), Some(&database))?);
        }
        Err(_) => println!("PostgreSQL is skipped: TEST_POSTGRES_URL is not set"),
    }
    print_table(&rows);
    Ok(rows.iter().all(Measurement::is_whole))
}

fn spawn_floor() -> anyhow::Result<SinkProcess> {
    let mut command = Command::new(env::current_exe().context("cannot find this executable")?);
    command.arg(FLOOR_ARGUMENT);
    SinkProcess::spawn(command)
}

fn spawn_server(directory: &Path, database: &Database) -> anyhow::Result<SinkProcess> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_live-meeting"));
    command.arg("serve").current_dir(directory);
    // The caller's environment may name a database or a LiveKit: the benchmark measures the defaults.
    command.env_clear();
    command.envs(["PATH", "LD_LIBRARY_PATH"].into_iter().filter_map(|name| Some((name, env::var_os(name)?))));
    command.envs([
        ("HOST", "127.0.0.1"),
        ("PORT", "0"),
        ("LIVEKIT_API_KEY", load::API_KEY),
        ("LIVEKIT_API_SECRET", load::API_SECRET),
        ("LIVE_MEETING__LIVEKIT__AUTOPILOT", "false"),
        ("LIVE_MEETING__ANALYSIS__ENABLED", "false"),
        ("ADMIN_API_KEY", "bench-admin-key-0123456789"),
        ("DATABASE_URL", database.url()),
    ]);
    SinkProcess::spawn(command)
}

/// One sink's row in the table.
struct Measurement {
    name: &'static str,
    rate: u32,
    answers: Answers,
    cpu_micros_per_event: f64,
    resident_mib: f64,
    /// `None` for the floor, which keeps nothing.
    kept: Option<u64>,
    load_average: String,
}

impl Measurement {
    fn is_whole(&self) -> bool {
        self.answers.errors == 0 && self.kept.is_none_or(|kept| kept == self.answers.taken)
    }
}

fn measure(
    name: &'static str,
    rate: u32,
    options: &Options,
    spawn: impl FnOnce() -> anyhow::Result<SinkProcess>,
    database: Option<&Database>,
) -> anyhow::Result<Measurement> {
    let requests = load::requests(rate, options.seconds)?;
    let mut sink = spawn().with_context(|| format!("cannot start {name}"))?;
    eprintln!("{name}: {} events in {} s", requests.len(), options.seconds);
    let sent = u32::try_from(requests.len())?;
    let cpu_before = sink.cpu_time()?;
    let answers = load::run(sink.address(), requests, rate);
    let cpu = sink.cpu_time()?.saturating_sub(cpu_before);
    let resident_kib = sink.resident_kib()?;
    if let Some(complaint) = sink.stop()? {
        eprintln!("{name}: {complaint}");
    }
    let answers = answers?;
    let kept = database.map(Database::applied_events).transpose()?;
    let measurement = Measurement {
        name,
        rate,
        answers,
        cpu_micros_per_event: cpu.as_secs_f64() * 1e6 / f64::from(sent),
        resident_mib: f64::from(resident_kib) / 1_024.0,
        kept,
        load_average: fs::read_to_string("/proc/loadavg").unwrap_or_default().split(' ').next().unwrap_or_default().to_owned(),
    };
    if !measurement.is_whole() {
        eprintln!("{name}: the last lines of its log:\n{}", sink.log_tail());
    }
    Ok(measurement)
}

fn print_table(rows: &[Measurement]) {
    println!(
        "\n{:<11}  {:>8}  {:>9}  {:>9}  {:>9}  {:>9}  {:>12}  {:>7}  {:>7}  {:>7}  {:>6}  {:>5}",
        "sink", "events/s", "p50", "p99", "max", "lateness", "CPU µs/event", "RSS MiB", "204s", "kept", "errors", "load"
    );
    for row in rows {
        let ms = |time: Duration| format!("{:.1} ms", time.as_secs_f64() * 1e3);
        println!(
            "{:<11}  {:>8}  {:>9}  {:>9}  {:>9}  {:>9}  {:>12.0}  {:>7.1}  {:>7}  {:>7}  {:>6}  {:>5}",
            row.name,
            row.rate,
            ms(row.answers.percentile(50)),
            ms(row.answers.percentile(99)),
            ms(row.answers.percentile(100)),
            ms(row.answers.lateness),
            row.cpu_micros_per_event,
            row.resident_mib,
            row.answers.taken,
            row.kept.map_or_else(|| "-".to_owned(), |kept| kept.to_string()),
            row.answers.errors,
            row.load_average,
        );
    }
    println!();
    for row in rows.iter().filter(|row| row.kept.is_some()) {
        let p99 = row.answers.percentile(99);
        let verdict = if p99 <= TARGET_P99 { "met" } else { "missed" };
        println!("target: {} at {}/s: p99 ≤ {TARGET_P99:?}: {p99:.1?}: {verdict}", row.name, row.rate);
        let verdict = if row.is_whole() { "met" } else { "missed" };
        println!("target: {}: every 204 is in the database: {verdict}", row.name);
        println!("{}: the slowest answer was that of an event due at {:.1?}", row.name, row.answers.slowest_at);
        if let Some(fault) = &row.answers.first_fault {
            println!("{}: the first fault: {fault}", row.name);
        }
    }
}

/// The least that a webhook's door can do.
fn floor() -> anyhow::Result<()> {
    use actix_web::{App, HttpResponse, HttpServer, web};

    actix_web::rt::System::new().block_on(async {
        let take = async |_: web::Bytes| HttpResponse::NoContent().finish();
        let server = HttpServer::new(move || App::new().route(load::PATH, web::post().to(take))).bind(("127.0.0.1", 0))?;
        let address = *server.addrs().first().context("no address")?;
        writeln!(std::io::stderr(), "listening address={address}")?;
        Ok(server.run().await?)
    })
}

/// A directory in the target directory that goes when this is dropped.
struct Workspace {
    path: PathBuf,
}

impl Workspace {
    fn create() -> anyhow::Result<Self> {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("webhooks-bench-{}", std::process::id()));
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self { path })
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            eprintln!("cannot remove {}: {error}", self.path.display());
        }
    }
}

fn since(due: Instant) -> Duration {
    Instant::now().saturating_duration_since(due)
}
