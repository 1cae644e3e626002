//! `live-meeting serve`

use std::process::ExitCode;

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::ConfigArg;
use crate::app::{self, Server};
use crate::fail_point;

#[derive(Debug, clap::Args)]
pub struct ServeArgs {
    #[command(flatten)]
    config: ConfigArg,
}

pub async fn run(args: ServeArgs) -> anyhow::Result<ExitCode> {
    fail_point::set_up();
    let config = args.config.load()?;
    raise_file_limit();
    keep_files_private();
    let mut signals = Signals::listen()?;
    ignore_hang_ups()?;
    // The start waits for a database that is away; it need not be waited for.
    let server = tokio::select! {
        server = app::start(config) => server?,
        () = signals.wait() => {
            log::info!("stopped before it had started");
            // Not by returning: that would wait for the files that are being repaired. The next start finishes them.
            std::process::exit(0);
        }
    };
    until_told(server, &mut signals).await;
    Ok(ExitCode::SUCCESS)
}

/// A terminal that goes, or a service manager that asks for a reload, ends no recording.
fn ignore_hang_ups() -> std::io::Result<()> {
    let mut hang_ups = signal(SignalKind::hangup())?;
    actix_rt::spawn(async move {
        while hang_ups.recv().await.is_some() {
            log::info!("a hang-up is ignored: the configuration is read at a start only");
        }
    });
    Ok(())
}

/// Every track takes a socket and a file, and the usual soft limit is 1,024: takes what the system allows.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        log::warn!("the limit of open files stays as it is limit={:?} error={error}", limit.current);
    }
}

/// What is made is for its owner, and for its group to read, whatever the shell allows: the database makes its files itself.
pub fn keep_files_private() {
    use rustix::fs::Mode;
    use rustix::process::umask;
    let private = Mode::from_raw_mode(0o027);
    let own = umask(private);
    umask(own | private);
}

/// Serves until a signal, and then stops; a second signal ends the process at once, which every recording survives.
pub async fn until_told(server: Server, signals: &mut Signals) {
    signals.wait().await;
    log::info!("stopping: tracks are sealed; a second signal ends at once");
    tokio::select! {
        () = server.stop() => {
            // Not by returning: that would wait for whatever hangs in the blocking pool.
            std::process::exit(0);
        }
        () = signals.wait() => {
            log::error!("ended at once by a second signal");
            std::process::exit(1);
        }
    }
}

/// What an operator or a service manager ends the server with.
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    /// Held so that a file over its limit is an error and not the process's end (`docs/FACTS.md`, F11).
    _file_size: Signal,
}

impl Signals {
    pub fn listen() -> std::io::Result<Self> {
        /// Linux's number on all of its common machines, and that of the BSDs.
        const SIGXFSZ: i32 = 25;
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            _file_size: signal(SignalKind::from_raw(SIGXFSZ))?,
        })
    }

    pub async fn wait(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
