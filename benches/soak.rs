//! A soak: tracks that stream for as long as asked, and whether the server needs more and more for them.
//!
//! ```text
//! cargo bench --bench soak -- [--tracks N] [--seconds S | --minutes M | --hours H]
//! ```
//!
//! The load is the ingest benchmark's (`ingest/load.rs`): LiveKit's 48 kHz stereo in real time, whose frames count. Segments are short; each that
//! is followed by another is read, held against the one before, and removed, so that a day takes no more disk than a minute (the server itself
//! never deletes). Resident memory and descriptors are printed as time goes by.
//!
//! The exit code is 1 when a frame is missing, doubled or foreign, or when memory or descriptors were not flat: what they are in the last quarter
//! is held against the second one, as the first is for warming up. Linux only.

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rustix::process::{Resource, Rlimit};

use crate::load::Pause;
use crate::process::SinkProcess;

#[path = "ingest/load.rs"]
#[expect(dead_code, reason = "the other benchmark has bounds of its own")]
mod load;
#[path = "ingest/process.rs"]
mod process;
#[path = "ingest/recordings.rs"]
#[expect(dead_code, reason = "the other benchmark has one file for each track")]
mod recordings;

const USAGE: &str = "usage: cargo bench --bench soak -- [--tracks N] [--seconds S | --minutes M | --hours H]

  --tracks N   tracks that stream at once, 1 to 1000 (default 100)
  --seconds S  how long they do, at least 10 (default 60)";

/// What is promised of a day with 100 tracks.
const MEMORY_SLOPE_KIB_PER_HOUR: f64 = 1_024.0;
/// What memory moves by within a short run, of which no slope can be told: pages that allocators take and give.
const MEMORY_NOISE_KIB: f64 = 4_096.0;
/// Files that are being sealed, and connections of the moment.
const DESCRIPTOR_NOISE: f64 = 16.0;

fn main() -> ExitCode {
    match Options::parse(env::args().skip(1)).and_then(|options| soak(&options)) {
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
    time: Duration,
}

impl Options {
    fn parse(arguments: impl Iterator<Item = String>) -> anyhow::Result<Self> {
        // `cargo bench` adds a flag behind what was asked for; `cargo test --all-targets` does not, and gets a short run.
        let mut arguments = arguments.collect::<Vec<_>>().into_iter();
        let is_bench = arguments.as_slice().iter().any(|argument| argument == "--bench");
        let (tracks, seconds) = if is_bench { (100, 60) } else { (20, 10) };
        let mut options = Self { tracks, time: Duration::from_secs(seconds) };
        while let Some(argument) = arguments.next() {
            let mut number = |least: u64, most: u64| {
                let value = arguments.next().and_then(|value| value.parse().ok()).filter(|value| (least..=most).contains(value));
                value.with_context(|| format!("{argument} wants a number from {least} to {most}\n\n{USAGE}"))
            };
            match argument.as_str() {
                "--bench" => {}
                "--tracks" => options.tracks = u16::try_from(number(1, 1_000)?)?,
                "--seconds" => options.time = Duration::from_secs(number(10, 1_000_000)?),
                "--minutes" => options.time = Duration::from_secs(60 * number(1, 20_000)?),
                "--hours" => options.time = Duration::from_secs(3_600 * number(1, 300)?),
                unknown => bail!("unknown argument {unknown:?}\n\n{USAGE}"),
            }
        }
        Ok(options)
    }
}

/// Whether all was as promised.
fn soak(options: &Options) -> anyhow::Result<bool> {
    raise_open_files_limit()?;
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).context("cannot make a directory")?;
    let segment = (options.time / 6).clamp(Duration::from_secs(2), Duration::from_secs(60));
    let mut sink = spawn_server(directory.path(), segment)?;
    let connections = load::connect(sink.address(), options.tracks)?;
    println!("{} tracks for {} s in segments of {} s", options.tracks, options.time.as_secs(), segment.as_secs());
    let streaming = load::start(connections, load::chunks_in(options.time), Pause::default())?;

    let (mut checker, mut samples) = (Checker::new(directory.path().join("storage/egress/audio")), Vec::new());
    let every = (options.time / 40).clamp(Duration::from_millis(250), Duration::from_secs(60));
    let (started, cpu_before) = (Instant::now(), sink.cpu_time()?);
    let mut printed = None;
    while started.elapsed() < options.time {
        thread::sleep(every);
        checker.check(false)?;
        let sample = Sample { at: started.elapsed(), resident_kib: f64::from(sink.resident_kib()?), descriptors: descriptors(&sink)? };
        if printed.is_none_or(|printed| sample.at >= printed + options.time / 10) {
            println!("{:>8.0} s  {:>9.0} KiB  {:>6.0} descriptors", sample.at.as_secs_f64(), sample.resident_kib, sample.descriptors);
            printed = Some(sample.at);
        }
        samples.push(sample);
    }
    let cpu = sink.cpu_time()?.saturating_sub(cpu_before);
    let streamed = streaming.finish()?;
    if let Some(complaint) = sink.stop()? {
        checker.faults.push(complaint);
    }
    checker.check(true)?;
    checker.faults.extend(streamed.faults);
    let wanted = u64::from(load::chunks_in(options.time)) * 480;
    checker.assert_lengths(options.tracks, wanted);

    println!(
        "{:.1} CPU µs/s audio, the load {:.1} ms behind its schedule at worst",
        cpu.as_secs_f64() * 1e6 / (options.time.as_secs_f64() * f64::from(options.tracks)),
        streamed.lateness.worst.as_secs_f64() * 1e3
    );
    let memory = growth(&samples, options.time, "memory", "KiB", MEMORY_NOISE_KIB, MEMORY_SLOPE_KIB_PER_HOUR, |sample| sample.resident_kib);
    let descriptors = growth(&samples, options.time, "descriptors", "of them", DESCRIPTOR_NOISE, 0.0, |sample| sample.descriptors);
    println!("{} files, {} gaps or other faults", checker.files, checker.faults.len());
    for fault in checker.faults.iter().take(10) {
        println!("fault: {fault}");
    }
    if !checker.faults.is_empty() {
        eprintln!("the last lines of the server's log:\n{}", sink.log_tail());
    }
    Ok(memory && descriptors && checker.faults.is_empty())
}

fn spawn_server(directory: &Path, segment: Duration) -> anyhow::Result<SinkProcess> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_live-meeting"));
    command.arg("serve").current_dir(directory).env_clear();
    command.envs(["PATH", "LD_LIBRARY_PATH"].into_iter().filter_map(|name| Some((name, env::var_os(name)?))));
    command.env("LIVE_MEETING__RECORDING__SEGMENT_DURATION", format!("{}s", segment.as_secs()));
    command.envs([
        ("HOST", "127.0.0.1"),
        ("PORT", "0"),
        ("LIVE_MEETING__INGEST__AUTH", "open"),
        ("ADMIN_API_KEY", "soak-admin-key-0123456789"),
        ("RUST_LOG", "warn,live_meeting=info"),
    ]);
    SinkProcess::spawn(command)
}

fn descriptors(sink: &SinkProcess) -> anyhow::Result<f64> {
    let open = fs::read_dir(format!("/proc/{}/fd", sink.child.id())).context("the server has died")?;
    Ok(f64::from(u32::try_from(open.count())?))
}

struct Sample {
    at: Duration,
    resident_kib: f64,
    descriptors: f64,
}

/// Whether the last quarter is as the second one, but for noise and for what is allowed in such a time.
fn growth(samples: &[Sample], time: Duration, what: &str, unit: &str, noise: f64, per_hour: f64, value: impl Fn(&Sample) -> f64) -> bool {
    let median = |from: u32, to: u32| {
        let within = samples.iter().filter(|sample| sample.at * 4 >= time * from && sample.at * 4 < time * to || to == 4 && sample.at >= time);
        let mut values: Vec<f64> = within.map(&value).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or_default()
    };
    let (early, late) = (median(1, 2), median(3, 4));
    let hours = time.as_secs_f64() / 2.0 / 3_600.0;
    let flat = late - early <= noise + per_hour * hours;
    let slope = (late - early) / hours;
    println!(
        "{what}: {early:.0} {unit} in the second quarter, {late:.0} in the last ({slope:+.0} in an hour): {}",
        if flat { "flat" } else { "NOT FLAT" }
    );
    flat
}

/// Reads segments that are done with, and removes them.
struct Checker {
    directory: PathBuf,
    /// By track: the counter that must come next, and the frames so far.
    next: BTreeMap<String, (u32, u64)>,
    files: u64,
    faults: Vec<String>,
}

impl Checker {
    fn new(directory: PathBuf) -> Self {
        Self { directory, next: BTreeMap::new(), files: 0, faults: Vec::new() }
    }

    /// All files at the end, before it those that another of their track follows.
    fn check(&mut self, is_end: bool) -> anyhow::Result<()> {
        // A name begins with its time and ends with its track.
        let mut by_track: BTreeMap<String, BTreeSet<PathBuf>> = BTreeMap::new();
        for directory in fs::read_dir(&self.directory).context("cannot list the recordings")?.flatten().filter(|entry| entry.path().is_dir()) {
            for path in
                fs::read_dir(directory.path())?.flatten().map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|kind| kind == "wav"))
            {
                let track = path.file_stem().and_then(|name| name.to_str()?.rsplit_once('_')).map(|(_, track)| track.to_owned());
                by_track.entry(track.context("a file without a track")?).or_default().insert(path);
            }
        }
        for (track, mut files) in by_track {
            if !is_end {
                // The last is being written, and the one before it may still be being sealed.
                files.pop_last();
                files.pop_last();
            }
            for path in files {
                self.check_file(&track, &path)?;
                fs::remove_file(&path)?;
                fs::remove_file(path.with_extension("wav.json")).ok(); // where there is one
            }
        }
        Ok(())
    }

    fn check_file(&mut self, track: &str, path: &Path) -> anyhow::Result<()> {
        let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        self.files += 1;
        let audio = bytes.get(recordings::HEADER_BYTES..).unwrap_or_default();
        let first = recordings::seed(track.trim_start_matches("TR").parse().context("a file of a track that is not ours")?);
        let (next, frames) = self.next.entry(track.to_owned()).or_insert((first, 0));
        let (counters, torn) = audio.as_chunks::<4>();
        for counter in counters {
            let counter = u32::from_le_bytes(*counter);
            if counter != *next {
                self.faults.push(format!("{}: {counter} where {next} was to come", path.display()));
                *next = counter;
            }
            *next = next.wrapping_add(1);
            *frames += 1;
        }
        if !torn.is_empty() {
            self.faults.push(format!("{}: a torn frame", path.display()));
        }
        Ok(())
    }

    fn assert_lengths(&mut self, tracks: u16, wanted: u64) {
        for track in 0..tracks {
            let frames = self.next.get(&format!("TR{track}")).map_or(0, |(_, frames)| *frames);
            if frames != wanted {
                self.faults.push(format!("track {track}: {frames} frames of {wanted}"));
            }
        }
    }
}

/// Raises the soft limit to the hard one; the server inherits it.
fn raise_open_files_limit() -> anyhow::Result<()> {
    let hard = rustix::process::getrlimit(Resource::Nofile).maximum;
    rustix::process::setrlimit(Resource::Nofile, Rlimit { current: hard, maximum: hard }).context("cannot raise the limit of open files")?;
    ensure!(hard.is_none_or(|hard| hard >= 2_500), "at most {} files may be open", hard.unwrap_or_default());
    Ok(())
}
