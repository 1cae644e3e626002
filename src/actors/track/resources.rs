//! What all tracks share.

use std::sync::Arc;

use crate::actors::buffer::budget::SpoolBudget;
use crate::actors::stats::WriteLag;
use crate::actors::totals::Totals;
use crate::analysis::connection::AnalysisService;
use crate::config::{AnalysisConfig, IngestConfig, RecordingConfig};
use crate::db::Store;
use crate::journal::Journal;
use crate::recording::append_pool::AppendPool;
use crate::recording::pipeline_log::PipelineLog;
use crate::recording::pulse::DiskPulse;
use crate::recording::root::Root;
use crate::recording::syncer::Syncer;
use crate::video::codec::Container;
use crate::watchdog::Watchdog;

/// What all tracks share.
pub struct TrackResources {
    /// The same, opened: where files are made and read.
    pub root: Root,
    pub video_root: Root,
    pub ingest: IngestConfig,
    pub recording: RecordingConfig,
    pub analysis: AnalysisConfig,
    pub store: Store,
    pub journal: Journal,
    pub pipeline_log: PipelineLog,
    pub lag: Arc<WriteLag>,
    pub totals: Arc<Totals>,
    pub budget: Arc<SpoolBudget>,
    /// What of it tracks of video may take.
    pub video_budget: Arc<SpoolBudget>,
    pub syncer: Syncer,
    pub append_pool: AppendPool,
    /// Whether the disk of audio answers, and that of video.
    pub pulse: DiskPulse,
    pub video_pulse: DiskPulse,
    pub watchdog: Watchdog,
    pub service: Service,
}

impl TrackResources {
    /// Where recordings of a kind lie.
    pub fn root_of(&self, container: Container) -> &Root {
        if container.is_video() { &self.video_root } else { &self.root }
    }
}

/// The analysis service, or why there is none.
pub enum Service {
    Streaming(AnalysisService),
    Nobody(&'static str),
}
