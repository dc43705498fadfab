//! A folder with the training sessions of one day.

use std::path::Path;

use bireme::data::{DataConfig, Days, Features, SessionFile, Sessions, Split};
use bireme::model::{GruConfig, Network, Neural};
use tch::Device;

use super::session_data::{self, COLOUR, PRICE};

/// Rows of the item table.
pub const N_ITEMS: i64 = 40;

/// The train file of day 1 with prices and colours.
pub struct OneDay {
    dir: tempfile::TempDir,
    days: Days,
}

pub fn data_config() -> DataConfig {
    let features = [PRICE, COLOUR].map(str::to_owned).into();
    DataConfig { first_day: Some(1), last_day: Some(2), features, ..DataConfig::default() }
}

impl OneDay {
    pub fn new(sessions: &[Vec<i64>]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        session_data::write_schema(dir.path(), N_ITEMS);
        let path = dir.path().join("1/train.parquet");
        session_data::write_sessions(&path, sessions, |item| item as f32 / 40.0);
        let days = Days::open(dir.path(), &data_config()).unwrap();
        Self { dir, days }
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    pub fn features(&self) -> &Features {
        self.days.features()
    }

    pub fn file(&self) -> SessionFile {
        self.days.file(1, Split::Train).unwrap()
    }

    /// A network that is ready to train on the day.
    pub fn gru(&self, config: &GruConfig) -> Network<'static> {
        let neural = Neural::Gru(config);
        let mut network = Network::new(&neural, self.features(), 20, 7, Device::Cpu).unwrap();
        network.begin_day(1, &self.file(), None).unwrap();
        network
    }

    pub fn sessions(&self) -> Sessions {
        let file = self.file();
        file.read(&file.spans(0..file.n_sessions())).unwrap()
    }
}
