//! Safetensors files: written from front to back and read where they are looked at, so that no tensor need be whole in memory.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;

use safetensors::SafeTensors;
use serde_json::{Map, Value, json};
use tch::{Device, Kind, TchError, Tensor};

use crate::collective::{Collective, CollectiveError};
use crate::device::host::numbers;
use crate::model::ItemTable;

/// Numbers of a table that travel at a time.
const BLOCK: i64 = 1 << 22;

/// Where tensors go, one after the other.
pub(super) struct TensorFile {
    file: BufWriter<File>,
    /// The first that went wrong: whoever sends what is to be written is not kept waiting.
    failed: Option<io::Error>,
}

impl TensorFile {
    /// For `named` tensors, all of them f32 or i64; of tables of items they are the rows of `share`, and the file will have
    /// all.
    pub fn create(path: &Path, named: &[(String, Tensor)], item_table: &ItemTable<'_>) -> io::Result<Self> {
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
            header
                .insert(name.clone(), json!({ "dtype": kind, "shape": size, "data_offsets": [start, end] }));
        }
        let mut header = Value::Object(header).to_string();
        // Numbers begin where any of them may.
        header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
        let mut file = BufWriter::new(File::create(path)?);
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        Ok(Self { file, failed: None })
    }

    /// Writes what comes next.
    pub fn put(&mut self, numbers: &Tensor) {
        if self.failed.is_none() {
            self.failed = write_numbers(&mut self.file, numbers).err();
        }
    }

    /// Forces all to disk.
    pub fn finish(mut self) -> io::Result<()> {
        match self.failed.take() {
            Some(failed) => Err(failed),
            None => {
                self.file.flush()?;
                self.file.get_ref().sync_all()
            }
        }
    }
}

fn write_numbers(file: &mut impl Write, numbers: &Tensor) -> io::Result<()> {
    let numbers = numbers.to_device(Device::Cpu).contiguous().view([-1]);
    let mut bytes = Vec::new();
    for first in (0..numbers.size()[0]).step_by(BLOCK as usize) {
        let block = numbers.narrow(0, first, BLOCK.min(numbers.size()[0] - first));
        bytes.resize(block.numel() * numbers.kind().elt_size_in_bytes(), 0);
        block.copy_data_u8(&mut bytes, block.numel());
        file.write_all(&bytes)?;
    }
    Ok(())
}

/// The named tensors of a file in the order in which they lie there, mapped into memory: what nobody looks at is not read, and
/// what was read takes no memory that the system could not have back. The file must not be written to meanwhile; it may be
/// removed.
///
/// # Errors
/// It cannot be read, or is no whole safetensors file.
pub(super) fn map(path: &Path) -> Result<Vec<(String, Tensor)>, TchError> {
    let refused = |err| TchError::SafeTensorError { path: path.display().to_string(), err };
    let name = path.to_str().ok_or_else(|| TchError::FileFormat("its path is not UTF-8".to_owned()))?;
    let n_bytes = fs::metadata(path)?.len();
    if n_bytes == 0 {
        return Err(refused(safetensors::SafeTensorError::HeaderTooSmall));
    }
    let file = Tensor::f_from_file(name, false, n_bytes as i64, (Kind::Uint8, Device::Cpu))?;
    let mut whole = file.shallow_clone();
    let bytes = numbers::<u8>(&mut whole);
    let found = SafeTensors::deserialize(bytes).map_err(refused)?;
    let mut found = found.tensors();
    // As they lie, not as a hash map gives them.
    found.sort_by_key(|(name, view)| (view.data().as_ptr().addr(), name.clone()));
    let tensor = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
        let kind = Kind::try_from(view.dtype())?;
        let start = view.data().as_ptr().addr() - bytes.as_ptr().addr();
        let tensor = file.narrow(0, start as i64, view.data().len() as i64);
        // Others may have put numbers where none of their kind can begin.
        let is_aligned = start.is_multiple_of(kind.elt_size_in_bytes());
        let tensor = if is_aligned { tensor } else { tensor.copy() };
        let size: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
        Ok((name, tensor.f_view_dtype(kind)?.f_view(size.as_slice())?))
    };
    found.into_iter().map(tensor).collect()
}

/// *All ranks* of the item_table. Hands all numbers of `named` to `put` in order, whoever has them. What only this rank has may lie
/// on any device.
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
        let of_row = tensor.size()[1..].to_vec();
        let most_rows = rows_at_a_time(&of_row);
        for (rank, rows) in item_table.rows_by_rank().into_iter().enumerate() {
            for first in (rows.start..rows.end).step_by(most_rows as usize) {
                let n = most_rows.min(rows.end - first);
                let mut block = match rank == ranks.rank() {
                    true => tensor.narrow(0, first - rows.start, n).to_device(Device::Cpu).contiguous(),
                    false => Tensor::empty([&[n], &of_row[..]].concat(), (tensor.kind(), Device::Cpu)),
                };
                ranks.broadcast(&mut block, rank)?;
                put(&block);
            }
        }
    }
    Ok(())
}

/// How many rows of this size travel at a time.
fn rows_at_a_time(of_row: &[i64]) -> i64 {
    (BLOCK / of_row.iter().product::<i64>()).max(1)
}

/// *All ranks* of a item_table, which are the `ranks`. What rank 0 has as `whole`, of this size and kind: the rows that are this rank's, as
/// far as there are any. A catalogue that has grown since has fewer rows there.
pub(super) fn deal(
    whole: Option<&Tensor>,
    (size, kind): (&[i64], Kind),
    item_table: &ItemTable<'_>,
    ranks: &dyn Collective,
) -> Result<Tensor, CollectiveError> {
    let of_row = &size[1..];
    let rows = item_table.rows.start.min(size[0])..item_table.rows.end.min(size[0]);
    let own = Tensor::empty([&[rows.end - rows.start], of_row].concat(), (kind, Device::Cpu));
    let most_rows = rows_at_a_time(of_row);
    for first in (0..size[0]).step_by(most_rows as usize) {
        let end = (first + most_rows).min(size[0]);
        let mut block = match whole {
            Some(whole) => whole.narrow(0, first, end - first).contiguous(),
            None => Tensor::empty([&[end - first], of_row].concat(), (kind, Device::Cpu)),
        };
        ranks.broadcast(&mut block, 0)?;
        let here = first.max(rows.start)..end.min(rows.end);
        if !here.is_empty() {
            let n = here.end - here.start;
            own.narrow(0, here.start - rows.start, n).copy_(&block.narrow(0, here.start - first, n));
        }
    }
    Ok(own)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::threads;

    #[test]
    fn a_file_is_the_same_whoever_has_which_rows_and_is_dealt_again() {
        let folder = tempfile::tempdir().unwrap();
        let table = || Tensor::arange(200 * 3, (Kind::Float, Device::Cpu)).view([200, 3]);
        let rest = || Tensor::arange(5, (Kind::Float, Device::Cpu));
        for world_size in [1, 3] {
            let path = folder.path().join(format!("{world_size}"));
            let dealt = threads::spawn(world_size, |collective| {
                let item_table = ItemTable::sharded(200, collective);
                let own = table().narrow(0, item_table.rows.start, item_table.len());
                let named = [("item_table.weight".to_owned(), own), ("rest".to_owned(), rest())];
                let mut file =
                    collective.root().map(|_| TensorFile::create(&path, &named, &item_table).unwrap());
                let put = |numbers: &Tensor| file.iter_mut().for_each(|file| file.put(numbers));
                stream(&named, &item_table, put).unwrap();
                if let Some(file) = file {
                    file.finish().unwrap();
                }
                // As many rows were saved as now, or fewer.
                [200, 90].map(|n_saved| {
                    if world_size == 1 {
                        return table().narrow(0, 0, n_saved);
                    }
                    let whole = collective.root().map(|_| table().narrow(0, 0, n_saved));
                    deal(whole.as_ref(), (&[n_saved, 3], Kind::Float), &item_table, collective).unwrap()
                })
            });
            let named = map(&path).unwrap();
            let of = |name: &str| &named.iter().find(|(other, _)| other == name).unwrap().1;
            assert!(of("item_table.weight").equal(&table()) && of("rest").equal(&rest()));
            for (which, n_saved) in [200, 90].into_iter().enumerate() {
                let parts: Vec<&Tensor> = dealt.iter().map(|of_rank| &of_rank[which]).collect();
                assert!(Tensor::cat(&parts, 0).equal(&table().narrow(0, 0, n_saved)));
            }
        }
        let [one, three] = ["1", "3"].map(|name| fs::read(folder.path().join(name)).unwrap());
        assert_eq!(one, three);
    }

    #[test]
    fn files_of_others_are_read_as_libtorch_reads_them_and_broken_ones_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        // Numbers that begin at odd places.
        let header = r#"{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"b":{"dtype":"F32","shape":[1,2],"data_offsets":[3,11]},"c":{"dtype":"F32","shape":[0],"data_offsets":[11,11]}}"#;
        let numbers = [&[7u8, 8, 9][..], &1.5f32.to_le_bytes(), &(-2f32).to_le_bytes()].concat();
        let whole = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &numbers].concat();
        fs::write(&path, &whole).unwrap();
        let of = |named: Vec<(String, Tensor)>| {
            let mut named = named;
            named.sort_by(|a, b| a.0.cmp(&b.0));
            named
        };
        let (ours, theirs) = (of(map(&path).unwrap()), of(Tensor::read_safetensors(&path).unwrap()));
        assert_eq!(ours.len(), 3);
        for ((name, tensor), (other, expected)) in ours.iter().zip(&theirs) {
            assert!(name == other && tensor.kind() == expected.kind() && tensor.equal(expected), "{name}");
        }
        // What is mapped stays when the file is gone.
        fs::remove_file(&path).unwrap();
        assert_eq!(ours[1].1.double_value(&[0, 1]), -2.0);
        for n_bytes in [0, 7, 60, whole.len() - 1] {
            fs::write(&path, &whole[..n_bytes]).unwrap();
            assert!(map(&path).is_err(), "{n_bytes}");
        }
        assert!(map(folder.path()).is_err());
    }
}
