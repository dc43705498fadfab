//! Safetensors files, written in blocks and mapped for reading, so that memory never holds a whole
//! file.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::ops::Range;
use std::path::Path;

use bireme_kernels::mapped_file;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::{Map, Value, json};
use tch::{Device, Kind, TchError, Tensor};

use crate::collective::{Collective, CollectiveError};
use crate::model::ItemTable;

/// Largest number of elements that are sent or written at a time.
const BLOCK: i64 = 1 << 22;

/// A file to which tensors are written one after the other.
pub(super) struct TensorFile {
    file: BufWriter<File>,
    /// The first error. [`TensorFile::finish`] returns it, because the collective calls that
    /// deliver the tensors must not stop on rank 0 alone.
    error: Option<io::Error>,
}

impl TensorFile {
    /// Creates a file with a header for the tensors `named`, f32 or i64. If the item table is
    /// sharded, its tensors have this rank's rows, and the file will have all rows.
    pub fn create(
        path: &Path,
        named: &[(String, Tensor)],
        item_table: &ItemTable<'_>,
    ) -> io::Result<Self> {
        let mut header = Map::new();
        let mut end = 0;
        for (name, tensor) in named {
            let mut size = tensor.size();
            if ItemTable::is_item_table(name) {
                size[0] = item_table.n_items;
            }
            let (kind, n_bytes) = match tensor.kind() {
                Kind::Int64 => ("I64", 8),
                _ => ("F32", 4),
            };
            let start = end;
            end += size.iter().product::<i64>() * n_bytes;
            header.insert(
                name.clone(),
                json!({ "dtype": kind, "shape": size, "data_offsets": [start, end] }),
            );
        }
        let mut header = Value::Object(header).to_string();
        // Padding aligns the data to 8 bytes.
        header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
        let mut file = BufWriter::new(File::create(path)?);
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        Ok(Self { file, error: None })
    }

    /// Writes the next elements.
    pub fn put(&mut self, elements: &Tensor) {
        if self.error.is_none() {
            self.error = write_elements(&mut self.file, elements).err();
        }
    }

    /// Flushes the file to disk.
    pub fn finish(mut self) -> io::Result<()> {
        match self.error.take() {
            Some(error) => Err(error),
            None => {
                self.file.flush()?;
                self.file.get_ref().sync_all()
            }
        }
    }
}

fn write_elements(file: &mut impl Write, elements: &Tensor) -> io::Result<()> {
    let elements = elements.to_device(Device::Cpu).contiguous().view([-1]);
    let mut bytes = Vec::new();
    for first in (0..elements.size()[0]).step_by(BLOCK as usize) {
        let block = elements.narrow(0, first, BLOCK.min(elements.size()[0] - first));
        bytes.resize(block.numel() * elements.kind().elt_size_in_bytes(), 0);
        block.copy_data_u8(&mut bytes, block.numel());
        file.write_all(&bytes)?;
    }
    Ok(())
}

/// Maps the tensors of a file into memory, in file order. Pages are read on access, and the system
/// can reclaim them. The file must not be modified while the tensors exist; it may be removed.
///
/// # Errors
/// The file cannot be read, or it is not a complete safetensors file.
pub(super) fn map(path: &Path) -> Result<Vec<(String, Tensor)>, TchError> {
    let refused = |err| TchError::SafeTensorError { path: path.display().to_string(), err };
    let (file, mut entries) = mapped_file::map(path, |bytes| {
        let views = SafeTensors::deserialize(bytes).map_err(refused)?;
        let entry = |(name, view): (String, TensorView<'_>)| {
            let first = view.data().as_ptr().addr() - bytes.as_ptr().addr();
            let size = view.shape().iter().map(|&n| n as i64).collect();
            let kind = Kind::try_from(view.dtype())?;
            Ok(FileEntry { name, kind, size, bytes: first..first + view.data().len() })
        };
        views.tensors().into_iter().map(entry).collect::<Result<Vec<_>, TchError>>()
    })?;
    // `tensors` iterates over a hash map.
    entries.sort_by(|a, b| (a.bytes.start, &a.name).cmp(&(b.bytes.start, &b.name)));
    let tensor = |FileEntry { name, kind, size, bytes }: FileEntry| {
        let tensor = file.narrow(0, bytes.start as i64, bytes.len() as i64);
        // Files of other programs may not be aligned.
        let is_aligned = bytes.start.is_multiple_of(kind.elt_size_in_bytes());
        let tensor = if is_aligned { tensor } else { tensor.copy() };
        Ok((name, tensor.f_view_dtype(kind)?.f_view(size.as_slice())?))
    };
    entries.into_iter().map(tensor).collect()
}

/// A tensor in the header of a file.
struct FileEntry {
    name: String,
    kind: Kind,
    size: Vec<i64>,
    /// Place of its elements in the file.
    bytes: Range<usize>,
}

/// *All ranks*, if the item table is sharded. Passes all elements of the tensors `named` to `put`,
/// in order: replicated tensors as they are, on any device, and sharded tables in blocks of rows
/// that the ranks that hold them broadcast.
pub(super) fn stream(
    named: &[(String, Tensor)],
    item_table: &ItemTable<'_>,
    mut put: impl FnMut(&Tensor),
) -> Result<(), CollectiveError> {
    for (name, tensor) in named {
        let Some(ranks) = item_table.ranks().filter(|_| ItemTable::is_item_table(name)) else {
            put(tensor);
            continue;
        };
        let row_size = tensor.size()[1..].to_vec();
        let max_rows = max_block_rows(&row_size);
        for (rank, rows) in item_table.rows_by_rank().into_iter().enumerate() {
            for first in (rows.start..rows.end).step_by(max_rows as usize) {
                let n = max_rows.min(rows.end - first);
                let mut block = if rank == ranks.rank() {
                    tensor.narrow(0, first - rows.start, n).to_device(Device::Cpu).contiguous()
                } else {
                    Tensor::empty([&[n], &row_size[..]].concat(), (tensor.kind(), Device::Cpu))
                };
                ranks.broadcast(&mut block, rank)?;
                put(&block);
            }
        }
    }
    Ok(())
}

/// Number of rows of this size in a block.
fn max_block_rows(row_size: &[i64]) -> i64 {
    (BLOCK / row_size.iter().product::<i64>()).max(1)
}

/// *All ranks.* Sends each rank its rows of `on_root`, a tensor of this size and kind on rank 0. A
/// table that was saved before the catalogue grew has fewer rows than `item_table`, so a rank may
/// get none.
pub(super) fn scatter_rows(
    on_root: Option<&Tensor>,
    size: &[i64],
    kind: Kind,
    item_table: &ItemTable<'_>,
    ranks: &dyn Collective,
) -> Result<Tensor, CollectiveError> {
    let row_size = &size[1..];
    let rows = item_table.rows.start.min(size[0])..item_table.rows.end.min(size[0]);
    let local = Tensor::empty([&[rows.end - rows.start], row_size].concat(), (kind, Device::Cpu));
    let max_rows = max_block_rows(row_size);
    for first in (0..size[0]).step_by(max_rows as usize) {
        let end = (first + max_rows).min(size[0]);
        let mut block = match on_root {
            Some(tensor) => tensor.narrow(0, first, end - first).contiguous(),
            None => Tensor::empty([&[end - first], row_size].concat(), (kind, Device::Cpu)),
        };
        ranks.broadcast(&mut block, 0)?;
        let overlap = first.max(rows.start)..end.min(rows.end);
        if !overlap.is_empty() {
            let n = overlap.end - overlap.start;
            local.narrow(0, overlap.start - rows.start, n).copy_(&block.narrow(
                0,
                overlap.start - first,
                n,
            ));
        }
    }
    Ok(local)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::collective::threads;

    #[test]
    fn a_file_does_not_depend_on_the_sharding_and_its_rows_are_scattered_again() {
        let folder = tempfile::tempdir().unwrap();
        let table = || Tensor::arange(200 * 3, (Kind::Float, Device::Cpu)).view([200, 3]);
        let rest = || Tensor::arange(5, (Kind::Float, Device::Cpu));
        for world_size in [1, 3] {
            let path = folder.path().join(format!("{world_size}"));
            let scattered = threads::spawn(world_size, |collective| {
                let item_table = ItemTable::sharded(200, collective);
                let local = table().narrow(0, item_table.rows.start, item_table.len());
                let named = [("item_table.weight".to_owned(), local), ("rest".to_owned(), rest())];
                let mut file = collective
                    .root()
                    .map(|_| TensorFile::create(&path, &named, &item_table).unwrap());
                let put = |elements: &Tensor| file.iter_mut().for_each(|file| file.put(elements));
                stream(&named, &item_table, put).unwrap();
                if let Some(file) = file {
                    file.finish().unwrap();
                }
                // The saved table has as many rows as now, or fewer.
                [200, 90].map(|n_saved| {
                    if world_size == 1 {
                        return table().narrow(0, 0, n_saved);
                    }
                    let saved = collective.root().map(|_| table().narrow(0, 0, n_saved));
                    scatter_rows(
                        saved.as_ref(),
                        &[n_saved, 3],
                        Kind::Float,
                        &item_table,
                        collective,
                    )
                    .unwrap()
                })
            });
            let named = map(&path).unwrap();
            let tensor = |name: &str| &named.iter().find(|(other, _)| other == name).unwrap().1;
            assert!(tensor("item_table.weight").equal(&table()) && tensor("rest").equal(&rest()));
            for (index, n_saved) in [200, 90].into_iter().enumerate() {
                let parts: Vec<&Tensor> = scattered.iter().map(|tensors| &tensors[index]).collect();
                assert!(Tensor::cat(&parts, 0).equal(&table().narrow(0, 0, n_saved)));
            }
        }
        let [one, three] = ["1", "3"].map(|name| fs::read(folder.path().join(name)).unwrap());
        assert_eq!(one, three);
    }

    #[test]
    fn unaligned_files_are_read_like_libtorch_does_and_truncated_ones_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        // The f32 data begins at an odd offset.
        let header = r#"{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},
                         "b":{"dtype":"F32","shape":[1,2],"data_offsets":[3,11]},
                         "c":{"dtype":"F32","shape":[0],"data_offsets":[11,11]}}"#;
        let numbers = [&[7u8, 8, 9][..], &1.5f32.to_le_bytes(), &(-2f32).to_le_bytes()].concat();
        let whole =
            [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &numbers].concat();
        fs::write(&path, &whole).unwrap();
        let sorted = |mut named: Vec<(String, Tensor)>| {
            named.sort_by(|a, b| a.0.cmp(&b.0));
            named
        };
        let mapped = sorted(map(&path).unwrap());
        let read_by_libtorch = sorted(Tensor::read_safetensors(&path).unwrap());
        assert_eq!(mapped.len(), 3);
        for ((name, tensor), (other, expected)) in mapped.iter().zip(&read_by_libtorch) {
            assert!(
                name == other && tensor.kind() == expected.kind() && tensor.equal(expected),
                "{name}"
            );
        }
        // A mapping outlives its file.
        fs::remove_file(&path).unwrap();
        assert_eq!(mapped[1].1.double_value(&[0, 1]), -2.0);
        for n_bytes in [0, 7, 60, whole.len() - 1] {
            fs::write(&path, &whole[..n_bytes]).unwrap();
            assert!(map(&path).is_err(), "{n_bytes}");
        }
        assert!(map(folder.path()).is_err());
    }
}
