//! Scratch files (buckets) of events, dealt by session, each small enough to be sorted in memory.

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::error::Error;
use crate::sessions::Event;
use crate::vocab::Coded;

/// Open buckets. Each gets all events of its sessions, in the order of the files.
#[derive(Debug)]
pub(crate) struct Buckets {
    files: Vec<(PathBuf, BufWriter<File>)>,
}

impl Buckets {
    /// The target size of a bucket; each thread holds two in memory.
    const TARGET_BYTES: u64 = 16 << 20;
    /// The limit on open files.
    const MOST: u64 = 256;

    /// The number of buckets for an input of this size: a row of CSV takes about 130 bytes,
    /// compressed a fifth of that.
    pub fn suitable(csv_bytes: u64, compressed_bytes: u64) -> usize {
        let rows = (csv_bytes + 5 * compressed_bytes) / 130;
        (rows * size_of::<Event>() as u64).div_ceil(Self::TARGET_BYTES).clamp(1, Self::MOST)
            as usize
    }

    pub fn create(dir: &Path, n_buckets: usize) -> Result<Self, Error> {
        let create = |bucket: usize| {
            let path = dir.join(format!("events-{bucket}"));
            let file = File::create(&path).map_err(Error::io("create", &path))?;
            Ok((path, BufWriter::with_capacity(1 << 16, file)))
        };
        Ok(Self { files: (0..n_buckets).map(create).collect::<Result<_, Error>>()? })
    }

    pub fn push(&mut self, events: impl IntoIterator<Item = Event>) -> Result<(), Error> {
        for event in events {
            let bucket = event.code(Coded::Session) as usize % self.files.len();
            let (path, file) = &mut self.files[bucket];
            file.write_all(bytemuck::bytes_of(&event)).map_err(Error::io("write", path))?;
        }
        Ok(())
    }

    /// Completes the files.
    pub fn finish(self) -> Result<Vec<PathBuf>, Error> {
        let flushed = self.files.into_iter().map(|(path, mut file)| {
            file.flush().map_err(Error::io("write", &path))?;
            Ok(path)
        });
        flushed.collect()
    }
}

pub(crate) fn read_events(path: &Path) -> Result<Vec<Event>, Error> {
    let mut file = File::open(path).map_err(Error::io("read", path))?;
    let bytes = file.metadata().map_err(Error::io("read", path))?.len() as usize;
    let mut events = vec![bytemuck::Zeroable::zeroed(); bytes / size_of::<Event>()];
    let read = file.read_exact(bytemuck::cast_slice_mut::<Event, u8>(&mut events));
    read.map(|()| events).map_err(Error::io("read", path))
}

/// Appends a range of a file's events.
pub(crate) fn read_events_at(
    path: &Path,
    places: Range<usize>,
    events: &mut Vec<Event>,
) -> Result<(), Error> {
    let start = events.len();
    events.resize(start + places.len(), bytemuck::Zeroable::zeroed());
    let bytes = bytemuck::cast_slice_mut::<Event, u8>(&mut events[start..]);
    let offset = (places.start * size_of::<Event>()) as u64;
    File::open(path)
        .and_then(|file| file.read_exact_at(bytes, offset))
        .map_err(Error::io("read", path))
}

/// Writes events for [`read_events`] and [`read_events_at`].
pub(crate) fn write_events<'a>(
    path: &Path,
    events: impl IntoIterator<Item = &'a [Event]>,
) -> Result<(), Error> {
    let mut file =
        BufWriter::with_capacity(1 << 18, File::create(path).map_err(Error::io("create", path))?);
    for events in events {
        file.write_all(bytemuck::cast_slice(events)).map_err(Error::io("write", path))?;
    }
    file.flush().map_err(Error::io("write", path))
}
