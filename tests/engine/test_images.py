"""Photographs become the patches Qwen2-VL takes, and whatever is no photograph is refused by name."""

from __future__ import annotations

import mmap
import os
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from engine import images
from engine.images import Grid, ImageError, find, grid_for, open_image, sample_photographs, write_patches
from tests.users import forbidden

MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]
ROOT = Path(__file__).parents[2]


def noise(width: int, height: int) -> Image.Image:
    generator = np.random.default_rng(width * 10_007 + height)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def reference_patches(image: Image.Image, grid: Grid) -> npt.NDArray[np.float64]:
    """One patch after the other, pixel block by pixel block, in double precision."""
    pixels = np.asarray(image.resize((grid.w * 14, grid.h * 14), Image.Resampling.BICUBIC)) / 255.0
    rows = []
    for block_y in range(grid.h // 2):
        for block_x in range(grid.w // 2):
            for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
                top, left = (2 * block_y + y) * 14, (2 * block_x + x) * 14
                patch = pixels[top : top + 14, left : left + 14]
                row = []
                for channel in range(3):
                    frame = ((patch[:, :, channel] - MEAN[channel]) / STD[channel]).ravel()
                    row += [frame, frame]
                rows.append(np.concatenate(row))
    return np.stack(rows)


def png(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


class TestPatches:
    @pytest.mark.parametrize("size", [(56, 56), (84, 140), (100, 60), (61, 997), (640, 427), (30, 31)])
    def test_match_a_patch_by_patch_reference(self, size: tuple[int, int]) -> None:
        image, grid = noise(*size), grid_for(*size)
        out = torch.full(grid.shape, torch.nan)
        write_patches(image, grid, out)
        np.testing.assert_allclose(out.numpy(), reference_patches(image, grid), rtol=0, atol=2e-6)

    def test_fill_exactly_their_place_in_shared_memory(self) -> None:
        image, grid = noise(120, 90), grid_for(120, 90)
        room = 16
        memory = mmap.mmap(-1, 2 * room * 4 + grid.nbytes)
        whole = torch.frombuffer(memory, dtype=torch.float32)
        whole.fill_(torch.nan)
        write_patches(image, grid, whole[room:-room].view(grid.shape))
        assert whole[:room].isnan().all()
        assert whole[-room:].isnan().all()
        assert not whole[room:-room].isnan().any()

    def test_take_no_second_full_size_float_buffer(self) -> None:
        image, grid = noise(1000, 1000), grid_for(1000, 1000)
        out = torch.zeros(grid.shape)
        tracemalloc.start()
        try:
            write_patches(image, grid, out)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        # One frame in float32 would be half of the patches.
        assert peak < grid.nbytes / 10

    def test_leave_the_photograph_as_it_was(self) -> None:
        image = noise(100, 60)
        before = image.tobytes()
        grid = grid_for(100, 60)
        write_patches(image, grid, torch.empty(grid.shape))
        assert image.tobytes() == before

    @pytest.mark.parametrize(
        "out",
        [
            torch.empty(16, 1175),
            torch.empty(15, 1176),
            torch.empty(16 * 1176),
            torch.empty(16, 1176, dtype=torch.float64),
            torch.empty(1176, 16).T,
            torch.empty(16, 1176, device="meta"),
        ],
        ids=["columns", "rows", "flat", "dtype", "strides", "device"],
    )
    def test_refuse_a_tensor_that_does_not_fit(self, out: torch.Tensor) -> None:
        with pytest.raises(ValueError, match=r"contiguous float32 tensor \[16, 1176\] on the CPU, not torch"):
            write_patches(noise(56, 56), Grid(1, 4, 4), out)

    @pytest.mark.parametrize("grid", [Grid(2, 4, 4), Grid(1, 3, 4), Grid(1, 4, 5), Grid(1, 0, 4)])
    def test_refuse_a_grid_without_whole_blocks(self, grid: Grid) -> None:
        with pytest.raises(ValueError, match="not one frame of whole 2x2 merge blocks"):
            write_patches(noise(56, 56), grid, torch.empty(grid.shape))

    def test_refuse_another_mode(self) -> None:
        with pytest.raises(ValueError, match="must be RGB, not L"):
            write_patches(noise(56, 56).convert("L"), Grid(1, 4, 4), torch.empty(16, 1176))


class TestGrid:
    def test_knows_its_tensor(self) -> None:
        grid = Grid(1, 60, 40)
        assert (grid.patches, grid.shape, grid.nbytes) == (2400, (2400, 1176), 11_289_600)
        assert grid.size == (560, 840)

    @pytest.mark.parametrize(
        ("width", "height", "h", "w"),
        [
            (224, 224, 16, 16),
            (1000, 1000, 72, 72),
            (1024, 1024, 74, 74),
            (1411, 1411, 100, 100),
            (600, 400, 28, 42),  # 14.29 and 21.43 blocks
            (70, 98, 8, 4),  # 2.5 and 3.5 blocks: halves go to the even number
            (28, 28, 4, 4),  # grown to the least area
            (20, 70, 8, 4),  # 1 x 2 blocks are too few: times 1.497 and up
            (4000, 3000, 86, 116),  # shrunk to the greatest area: 58.4 x 43.8 blocks and down
            (2000, 10, 2, 142),  # never thinner than a block
        ],
    )
    def test_is_the_one_qwen2_vl_takes(self, width: int, height: int, h: int, w: int) -> None:
        assert grid_for(width, height) == Grid(1, h, w)

    def test_follows_other_limits(self) -> None:
        assert grid_for(1000, 1000, max_pixels=28 * 28 * 100) == Grid(1, 20, 20)
        assert grid_for(100, 100, min_pixels=28 * 28 * 100) == Grid(1, 20, 20)

    @given(width=st.integers(1, 30_000), height=st.integers(1, 30_000), turn=st.booleans())
    def test_keeps_its_bounds(self, width: int, height: int, turn: bool) -> None:
        height = min(max(height, -(-width // 200)), width * 200)
        grid = grid_for(width, height)
        across, down = grid.size
        assert across % 28 == 0
        assert down % 28 == 0
        assert images.MIN_PIXELS <= across * down <= images.MAX_PIXELS
        # A photograph turned by 90 degrees has its grid turned.
        assert grid_for(height, width) == Grid(1, grid.w, grid.h)

    @pytest.mark.parametrize("size", [(100, 100), (451, 300), (1411, 1411), (6000, 4000), (300, 2000)])
    def test_scales_to_megapixels_both_ways(self, size: tuple[int, int]) -> None:
        grid = grid_for(*size, megapixels=1.0)
        across, down = grid.size
        assert across * down == pytest.approx(1e6, rel=0.05)
        assert across / down == pytest.approx(size[0] / size[1], rel=0.1)
        assert 16e6 < grid.nbytes < 25.5e6

    def test_refuses_a_ribbon(self) -> None:
        assert grid_for(10, 2000).patches > 0
        with pytest.raises(ImageError, match="10 x 2001 pixels: one side is over 200 times the other"):
            grid_for(10, 2001)

    @pytest.mark.parametrize("megapixels", [0.0, -1.0, float("nan"), float("inf")])
    def test_refuses_senseless_megapixels(self, megapixels: float) -> None:
        with pytest.raises(ValueError, match="megapixels must be a positive number"):
            grid_for(100, 100, megapixels=megapixels)

    def test_refuses_senseless_sides_and_limits(self) -> None:
        with pytest.raises(ValueError, match="not 0 x 5"):
            grid_for(0, 5)
        with pytest.raises(ValueError, match="min_pixels 9 must be positive and not above max_pixels 8"):
            grid_for(5, 5, min_pixels=9, max_pixels=8)


class TestFind:
    def test_lists_files_and_folders_in_order(self, tmp_path: Path) -> None:
        folder = tmp_path / "folder"
        (folder / "deep").mkdir(parents=True)
        (folder / ".thumbnails").mkdir()
        for name in ("b.JPG", "deep/a.png", "c.txt", ".thumbnails/t.png", "._b.JPG", "a.webp"):
            (folder / name).touch()
        odd = tmp_path / "photograph.raw"
        odd.touch()
        expected = [odd, folder / "a.webp", folder / "b.JPG", folder / "deep" / "a.png", odd]
        assert find([odd, str(folder), odd]) == expected

    def test_names_what_is_missing(self, tmp_path: Path) -> None:
        with pytest.raises(ImageError, match=r"nowhere\.jpg: no such file or folder"):
            find([tmp_path / "nowhere.jpg"])

    def test_names_a_folder_without_images(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").touch()
        with pytest.raises(ImageError, match=rf"{tmp_path}: no images in this folder \(looked for \.bmp"):
            find([tmp_path])

    def test_a_folder_that_may_not_be_read_is_not_said_to_be_empty(self, short_path: Path) -> None:
        (short_path / "a.png").touch()
        with forbidden(short_path), pytest.raises(ImageError, match=f"{short_path}: Permission denied"):
            find([short_path])

    def test_names_a_path_that_cannot_be_looked_at(self) -> None:
        with pytest.raises(ImageError, match="x: File name too long"):
            find(["x" * 5000])

    def test_without_paths_gives_the_samples(self) -> None:
        assert find([]) == sample_photographs()


class TestSamples:
    def test_are_colour_photographs(self) -> None:
        photographs = sample_photographs()
        assert len(photographs) == len(images.SAMPLES)
        for path in photographs:
            image = open_image(path)
            assert min(image.size) >= 300, path
            red, _, blue = (np.asarray(band).astype(int) for band in image.split())
            # Far more colours than a drawing has, and not all of them grey.
            assert image.getcolors(maxcolors=5_000) is None, path
            assert np.abs(red - blue).mean() > 1, path

    def test_are_found_without_importing_their_package(self) -> None:
        code = "import sys; from engine.images import find; find([]); sys.exit('skimage' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], check=False, timeout=60, cwd=ROOT)
        assert done.returncode == 0

    def test_say_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "skimage", None)
        with pytest.raises(ImageError, match=r"pip install scikit-image \(.* extra `photographs`\)"):
            find([])

    def test_may_be_missing_from_the_package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "skimage").mkdir()
        (tmp_path / "skimage" / "__init__.py").touch()
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ImageError, match="none of the sample photographs is in"):
            find([])


class TestOpen:
    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
    def test_gives_rgb(self, mode: str, tmp_path: Path) -> None:
        noise(40, 30).convert(mode).save(tmp_path / "image.png")
        image = open_image(tmp_path / "image.png")
        assert (image.mode, image.size) == ("RGB", (40, 30))

    def test_keeps_the_colours(self, tmp_path: Path) -> None:
        noise(40, 30).save(tmp_path / "image.png")
        assert open_image(tmp_path / "image.png").tobytes() == noise(40, 30).tobytes()

    def test_scales_16_bit_greys(self, tmp_path: Path) -> None:
        Image.fromarray(np.array([[0, 0x1234, 0x80FF, 0xFFFF]], np.uint16)).save(tmp_path / "grey.png")
        greys = np.asarray(open_image(tmp_path / "grey.png"))[0, :, 0]
        assert greys.tolist() == [0, 0x12, 0x80, 0xFF]

    def test_turns_it_upright(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera was held a quarter turn to the left
        image = Image.new("RGB", (40, 20), "blue")
        image.paste("red", (0, 0, 20, 20))
        image.save(tmp_path / "turned.png", exif=exif)
        upright = open_image(tmp_path / "turned.png")
        assert upright.size == (20, 40)
        assert upright.getpixel((10, 5)) == (255, 0, 0)

    def test_closes_the_file(self, tmp_path: Path) -> None:
        noise(40, 30).save(tmp_path / "image.png")
        before = len(os.listdir("/proc/self/fd"))
        image = open_image(tmp_path / "image.png")
        assert len(os.listdir("/proc/self/fd")) == before
        assert image.size == (40, 30)

    @pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tif"])
    def test_refuses_a_truncated_file(self, suffix: str, tmp_path: Path) -> None:
        path = tmp_path / f"cut.{suffix}"
        noise(200, 150).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ImageError, match=rf"cut\.{suffix}: not a readable image: ."):
            open_image(path)

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", "the file is empty"),
            (b"hello, world\n" * 100, "no image format known here"),
            (png(20_000, 20_000), "decompression bomb"),
        ],
        ids=["empty", "text", "bomb"],
    )
    def test_refuses_what_is_no_photograph(self, content: bytes, reason: str, tmp_path: Path) -> None:
        path = tmp_path / "cat.jpg"
        path.write_bytes(content)
        with pytest.raises(ImageError, match=rf"cat\.jpg: not a readable image: .*{reason}"):
            open_image(path)

    @pytest.mark.filterwarnings("default::PIL.Image.DecompressionBombWarning")
    def test_refuses_what_pillow_only_warns_of(self, tmp_path: Path) -> None:
        path = tmp_path / "large.png"
        path.write_bytes(png(10_000, 9_500))
        with (
            pytest.warns(Image.DecompressionBombWarning),
            pytest.raises(ImageError, match="10000 x 9500 pixels are more than the 89478485 allowed"),
        ):
            open_image(path)

    def test_refuses_greys_without_a_range(self, tmp_path: Path) -> None:
        Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "depth.tif")
        with pytest.raises(ImageError, match="32-bit greys have no fixed range"):
            open_image(tmp_path / "depth.tif")

    def test_refuses_what_is_no_file(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.jpg")
        for name, reason in (("none.jpg", "no such file"), ("pipe.jpg", "not a regular"), (".", "not a reg")):
            with pytest.raises(ImageError, match=reason):
                open_image(tmp_path / name)

    @given(position=st.floats(0, 1), value=st.integers(0, 255), suffix=st.sampled_from(["png", "jpg", "gif"]))
    def test_answers_damage_with_one_error(
        self, position: float, value: int, suffix: str, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        path = tmp_path_factory.mktemp("damaged") / f"image.{suffix}"
        noise(30, 20).save(path)
        data = bytearray(path.read_bytes())
        data[int(position * (len(data) - 1))] = value
        path.write_bytes(data)
        try:
            answer = open_image(path).mode
        except ImageError as error:
            answer = str(error)
        assert answer == "RGB" or answer.startswith(f"{path}: not a readable image: ")
