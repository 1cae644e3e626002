//! The command line.

mod check;
mod demo;
mod egress_sender;
mod repair;
mod replay;
mod serve;
mod speech;
mod ticket;
mod video_clip;

use std::path::{Path, PathBuf};

use clap::{Parser, Subcommand};

use crate::config::{Config, Env, Loaded};

/// Records every track of a LiveKit deployment, remembers every meeting, and streams the audio to analysis.
///
/// LiveKit's Track Egress streams each participant's audio to this server over WebSocket; it becomes a WAV file that no crash can spoil.
/// LiveKit's webhooks tell the life of each meeting. All of it is answered over REST. `live-meeting demo` shows it in ten seconds.
#[derive(Debug, Parser)]
#[command(name = "live-meeting", version, about, long_about, propagate_version = true, args_conflicts_with_subcommands = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: serve::ServeArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the server (the default)
    Serve(serve::ServeArgs),
    /// Show what the server does: a meeting of two speakers is recorded before your eyes
    Demo(demo::DemoArgs),
    /// Play WAV files at a running server, as LiveKit's egress would, or files of video, as a bridge
    Replay(replay::ReplayArgs),
    /// Make a ticket that opens the ingest for one track, and the URL to give to LiveKit
    Ticket(ticket::TicketArgs),
    /// Look at configuration, database, storage and LiveKit credentials, and say what is found
    Check(check::CheckArgs),
    /// Repair recordings that were interrupted, by hand: without a server or a database
    Repair(repair::RepairArgs),
}

/// Where the configuration comes from.
#[derive(Debug, clap::Args)]
struct ConfigArg {
    /// Configuration file [default: config.toml of the working directory, if it exists]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl ConfigArg {
    /// Reads `.env`, the environment and the file, and starts logging.
    fn load(&self) -> anyhow::Result<Config> {
        let env = environment()?;
        start_logging(&env, "info");
        let Loaded { config, notices } = Config::load(self.config.as_deref(), &env)?;
        for notice in notices {
            log::warn!("{notice}");
        }
        Ok(config)
    }
}

impl Cli {
    /// Runs the command.
    ///
    /// # Errors
    /// Whatever kept it from its work, in words for whoever typed it.
    pub async fn run(self) -> anyhow::Result<std::process::ExitCode> {
        match self.command {
            None => serve::run(self.serve).await,
            Some(Command::Serve(args)) => serve::run(args).await,
            Some(Command::Demo(args)) => demo::run(args).await,
            Some(Command::Replay(args)) => replay::run(args).await,
            Some(Command::Ticket(args)) => ticket::run(&args),
            Some(Command::Check(args)) => check::run(args).await,
            Some(Command::Repair(args)) => repair::run(&args),
        }
    }
}

fn environment() -> anyhow::Result<Env> {
    Ok(Env::load(Some(Path::new(".env")))?)
}

/// `RUST_LOG` sets the filter. Other crates stay at `info` and above whatever it says: some would log addresses with their tickets.
fn start_logging(env: &Env, default: &str) {
    let mut builder = env_logger::Builder::new();
    builder.parse_filters(env.get("RUST_LOG").unwrap_or(default));
    builder.format_timestamp_millis();
    let logger = builder.build();
    let most = logger.filter();
    let quiet = Quiet(logger);
    if log::set_boxed_logger(Box::new(quiet)).is_ok() {
        log::set_max_level(most);
    }
}

/// A logger that lets no other crate speak of details.
struct Quiet(env_logger::Logger);

impl log::Log for Quiet {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        let ours = metadata.target().starts_with("live_meeting");
        (ours || metadata.level() <= log::Level::Info) && self.0.enabled(metadata)
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            self.0.log(record);
        }
    }

    fn flush(&self) {
        self.0.flush();
    }
}
