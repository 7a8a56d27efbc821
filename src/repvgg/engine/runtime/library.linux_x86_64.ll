; Generated from library.c by `make thread-pool-ir` with clang 16: do not edit.

%struct.description = type { [128 x i8], [32 x i8], i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64 }
%struct.model = type { i32, i32, i64, i64, ptr, ptr, ptr, i64, ptr, ptr, ptr, ptr, [200 x i8] }
%struct.thread_pool = type { i32, [60 x i8], i32, [60 x i8], ptr, i64, i64, [40 x i8], i64, [56 x i8], i64, [56 x i8], i64, i64, [48 x i8], [16 x i64], [16 x i64], [0 x i64] }
%struct.step = type { ptr, ptr, ptr, ptr, ptr, i64, i64, i64, i64, [56 x i8], i64, i64, i64, i64, [32 x i8] }
%struct.step_description = type { i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64 }
%union.thread_attributes = type { [16 x i64] }
%union.signal_set = type { [16 x i64] }
%struct.input = type { [3 x i64] }
%struct.output = type { i64, [8 x i64], i64, i64, [3 x i64], [3 x i64] }

@error_without_handle = internal global ptr @.str.10, align 8
@.str = private constant [39 x i8] c"Pass a place for the handle, not NULL.\00", align 1
@model_description = external constant %struct.description, align 8
@.str.1 = private constant [53 x i8] c"The number of threads is 0, for the default, to 512.\00", align 1
@.str.2 = private constant [57 x i8] c"The library contains its weights: pass NULL, not a path.\00", align 1
@.str.3 = private constant [58 x i8] c"Pass the path of the file of weights next to the library.\00", align 1
@.str.4 = private constant [44 x i8] c"There is not enough memory for the network.\00", align 1
@model_weights = external constant [0 x i8], align 1
@.str.5 = private constant [68 x i8] c"The file of weights cannot be read, or is not that of this library.\00", align 1
@.str.6 = private constant [53 x i8] c"The system refused to start a thread: ask for fewer.\00", align 1
@.str.7 = private constant [42 x i8] c"Pass a handle that was created, not NULL.\00", align 1
@.str.8 = private constant [3 x i8] c"%s\00", align 1
@.str.9 = private constant [128 x i8] c"The library was exported for at most %lld images at once, got %lld: export it with a larger --max-batch, or pass them in parts.\00", align 1
@.str.10 = private constant [1 x i8] zeroinitializer, align 1
@.str.11 = private constant [93 x i8] c"This processor lacks instructions of x86-64-v2 (SSE4.2), which the library was compiled for.\00", align 1
@.str.12 = private constant [91 x i8] c"This processor lacks instructions of x86-64-v3 (AVX2, FMA): export for --target x86-64-v2.\00", align 1
@.str.13 = private constant [89 x i8] c"This processor lacks instructions of x86-64-v4 (AVX-512): export for --target x86-64-v3.\00", align 1
@model_kernels = external constant [0 x ptr], align 8
@.str.14 = private constant [34 x i8] c"The number of images is negative.\00", align 1
@.str.15 = private constant [59 x i8] c"Pass an array of inputs and an array of outputs, not NULL.\00", align 1
@.str.16 = private constant [44 x i8] c"An input is NULL or not aligned to 4 bytes.\00", align 1
@.str.17 = private constant [45 x i8] c"An output is NULL or not aligned to 4 bytes.\00", align 1

define ptr @model_last_error(ptr %handle) nounwind {
entry:
  %tobool.not = icmp eq ptr %handle, null
  br i1 %tobool.not, label %cond.false, label %cond.true

cond.true:
  %error = getelementptr inbounds %struct.model, ptr %handle, i64 0, i32 12
  br label %cond.end

cond.false:
  %0 = load atomic i64, ptr @error_without_handle seq_cst, align 8
  %1 = inttoptr i64 %0 to ptr
  br label %cond.end

cond.end:
  %cond = phi ptr [ %error, %cond.true ], [ %1, %cond.false ]
  ret ptr %cond
}

define i32 @model_create(ptr %weights, i32 %threads, ptr %out) nounwind {
entry:
  %memory.i = alloca ptr, align 8
  %processors = alloca [16 x i64], align 16
  %tobool.not = icmp eq ptr %out, null
  br i1 %tobool.not, label %if.then, label %if.end

if.then:
  store atomic i64 ptrtoint (ptr @.str to i64), ptr @error_without_handle seq_cst, align 8
  br label %return

if.end:
  store ptr null, ptr %out, align 8
  %0 = tail call { i32, i32, i32, i32 } asm sideeffect "cpuid", "={ax},={bx},={cx},={dx},0,2,~{dirflag},~{fpsr},~{flags}"(i32 0, i32 0)
  %asmresult.i.i = extractvalue { i32, i32, i32, i32 } %0, 0
  %1 = tail call { i32, i32, i32, i32 } asm sideeffect "cpuid", "={ax},={bx},={cx},={dx},0,2,~{dirflag},~{fpsr},~{flags}"(i32 -2147483648, i32 0)
  %asmresult.i44.i = extractvalue { i32, i32, i32, i32 } %1, 0
  %cmp.i = icmp eq i32 %asmresult.i.i, 0
  %cmp4.i = icmp ult i32 %asmresult.i44.i, -2147483647
  %or.cond.i = select i1 %cmp.i, i1 true, i1 %cmp4.i
  br i1 %or.cond.i, label %cpu_level.exit, label %if.end.i

if.end.i:
  %2 = tail call { i32, i32, i32, i32 } asm sideeffect "cpuid", "={ax},={bx},={cx},={dx},0,2,~{dirflag},~{fpsr},~{flags}"(i32 1, i32 0)
  %asmresult2.i60.i = extractvalue { i32, i32, i32, i32 } %2, 2
  %3 = tail call { i32, i32, i32, i32 } asm sideeffect "cpuid", "={ax},={bx},={cx},={dx},0,2,~{dirflag},~{fpsr},~{flags}"(i32 -2147483647, i32 0)
  %asmresult2.i74.i = extractvalue { i32, i32, i32, i32 } %3, 2
  %and.i.i = and i32 %asmresult2.i60.i, 9970177
  %cmp.i.i = icmp eq i32 %and.i.i, 9970177
  %and.i86.i = and i32 %asmresult2.i74.i, 1
  %cmp.i87.i = icmp ne i32 %and.i86.i, 0
  %or.cond114.i = select i1 %cmp.i.i, i1 %cmp.i87.i, i1 false
  br i1 %or.cond114.i, label %if.end14.i, label %cpu_level.exit

if.end14.i:
  %and.i88.i = and i32 %asmresult2.i60.i, 943722496
  %cmp.i89.i = icmp eq i32 %and.i88.i, 943722496
  br i1 %cmp.i89.i, label %lor.lhs.false16.i, label %cpu_level.exit

lor.lhs.false16.i:
  %and.i90.i = and i32 %asmresult2.i74.i, 32
  %cmp.i91.i = icmp ne i32 %and.i90.i, 0
  %cmp19.i = icmp ugt i32 %asmresult.i.i, 6
  %or.cond38.not.i = select i1 %cmp.i91.i, i1 %cmp19.i, i1 false
  br i1 %or.cond38.not.i, label %if.end21.i, label %cpu_level.exit

if.end21.i:
  %4 = tail call { i32, i32, i32, i32 } asm sideeffect "cpuid", "={ax},={bx},={cx},={dx},0,2,~{dirflag},~{fpsr},~{flags}"(i32 7, i32 0)
  %asmresult1.i93.i = extractvalue { i32, i32, i32, i32 } %4, 1
  %5 = tail call { i32, i32 } asm sideeffect "xgetbv", "={ax},={dx},{cx},~{dirflag},~{fpsr},~{flags}"(i32 0)
  %asmresult.i = extractvalue { i32, i32 } %5, 0
  %and.i106.i = and i32 %asmresult1.i93.i, 296
  %cmp.i107.i = icmp eq i32 %and.i106.i, 296
  %and.i108.i = and i32 %asmresult.i, 6
  %cmp.i109.i = icmp eq i32 %and.i108.i, 6
  %or.cond115.i = select i1 %cmp.i107.i, i1 %cmp.i109.i, i1 false
  br i1 %or.cond115.i, label %if.end29.i, label %cpu_level.exit

if.end29.i:
  %and.i110.i = and i32 %asmresult1.i93.i, -805109760
  %cmp.i111.i = icmp eq i32 %and.i110.i, -805109760
  br i1 %cmp.i111.i, label %land.rhs.i, label %cpu_level.exit

land.rhs.i:
  %and.i112.i = and i32 %asmresult.i, 230
  %cmp.i113.i = icmp eq i32 %and.i112.i, 230
  %6 = select i1 %cmp.i113.i, i64 4, i64 3
  br label %cpu_level.exit

cpu_level.exit:
  %retval.2.i = phi i64 [ 1, %if.end ], [ 1, %if.end.i ], [ 2, %lor.lhs.false16.i ], [ 2, %if.end14.i ], [ 2, %if.end21.i ], [ 3, %if.end29.i ], [ %6, %land.rhs.i ]
  %7 = load i64, ptr getelementptr inbounds (%struct.description, ptr @model_description, i64 0, i32 4), align 8
  %cmp = icmp ult i64 %retval.2.i, %7
  br i1 %cmp, label %if.then2, label %if.end5

if.then2:
  %switch.selectcmp.i = icmp eq i64 %7, 3
  %switch.selectcmp2.i = icmp eq i64 %7, 2
  %8 = select i1 %switch.selectcmp.i, i64 ptrtoint (ptr @.str.12 to i64), i64 ptrtoint (ptr @.str.13 to i64)
  %9 = select i1 %switch.selectcmp2.i, i64 ptrtoint (ptr @.str.11 to i64), i64 %8
  store atomic i64 %9, ptr @error_without_handle seq_cst, align 8
  br label %return

if.end5:
  %or.cond = icmp ugt i32 %threads, 512
  br i1 %or.cond, label %if.then8, label %if.end10

if.then8:
  store atomic i64 ptrtoint (ptr @.str.1 to i64), ptr @error_without_handle seq_cst, align 8
  br label %return

if.end10:
  %tobool11 = icmp ne ptr %weights, null
  %10 = load i64, ptr getelementptr inbounds (%struct.description, ptr @model_description, i64 0, i32 3), align 8
  %tobool12 = icmp ne i64 %10, 0
  %or.cond96 = select i1 %tobool11, i1 %tobool12, i1 false
  br i1 %or.cond96, label %if.then13, label %if.end15

if.then13:
  store atomic i64 ptrtoint (ptr @.str.2 to i64), ptr @error_without_handle seq_cst, align 8
  br label %return

if.end15:
  %or.cond97 = select i1 %tobool11, i1 true, i1 %tobool12
  br i1 %or.cond97, label %if.end21, label %if.then19

if.then19:
  store atomic i64 ptrtoint (ptr @.str.3 to i64), ptr @error_without_handle seq_cst, align 8
  br label %return

if.end21:
  store ptr null, ptr %memory.i, align 8
  %call.i = call i32 @posix_memalign(ptr %memory.i, i64 64, i64 288)
  %tobool.not.i = icmp eq i32 %call.i, 0
  br i1 %tobool.not.i, label %cond.false.i, label %aligned_zeros.exit

cond.false.i:
  %11 = load ptr, ptr %memory.i, align 8
  %call1.i = call ptr @memset(ptr %11, i32 0, i64 288)
  br label %aligned_zeros.exit

aligned_zeros.exit:
  %cond.i = phi ptr [ %call1.i, %cond.false.i ], [ null, %if.end21 ]
  %tobool23.not = icmp eq ptr %cond.i, null
  br i1 %tobool23.not, label %if.then24, label %if.end26

if.then24:
  store atomic i64 ptrtoint (ptr @.str.4 to i64), ptr @error_without_handle seq_cst, align 8
  br label %return

if.end26:
  br i1 %tobool11, label %land.lhs.true28, label %if.end33

land.lhs.true28:
  %call29 = call fastcc ptr @map_weights(ptr %cond.i, ptr %weights)
  %tobool30.not = icmp eq ptr %call29, null
  br i1 %tobool30.not, label %if.then31, label %if.end33

if.then31:
  store atomic i64 ptrtoint (ptr @.str.5 to i64), ptr @error_without_handle seq_cst, align 8
  call void @model_destroy(ptr %cond.i)
  br label %return

if.end33:
  %data.0 = phi ptr [ %call29, %land.lhs.true28 ], [ @model_weights, %if.end26 ]
  %call34 = call fastcc i64 @allowed_processors(ptr %processors)
  %call35 = call i32 @getpid()
  %process = getelementptr inbounds %struct.model, ptr %cond.i, i64 0, i32 1
  store i32 %call35, ptr %process, align 4
  %conv = zext i32 %threads to i64
  %num_threads = getelementptr inbounds %struct.model, ptr %cond.i, i64 0, i32 2
  store i64 %conv, ptr %num_threads, align 8
  %cmp36 = icmp eq i32 %threads, 0
  br i1 %cmp36, label %if.then38, label %if.end50

if.then38:
  %12 = load i64, ptr getelementptr inbounds (%struct.description, ptr @model_description, i64 0, i32 5), align 8
  %tobool39.not = icmp ne i64 %12, 0
  %cmp41 = icmp ult i64 %12, %call34
  %or.cond141 = select i1 %tobool39.not, i1 %cmp41, i1 false
  %cond = select i1 %or.cond141, i64 %12, i64 %call34
  %storemerge = call i64 @llvm.umin.i64(i64 %cond, i64 512)
  store i64 %storemerge, ptr %num_threads, align 8
  br label %if.end50

if.end50:
  %13 = load i64, ptr %num_threads, align 8
  %mul = shl i64 %13, 3
  %add = add i64 %mul, 640
  %call52 = call fastcc ptr @aligned_zeros(i64 %add)
  %pool = getelementptr inbounds %struct.model, ptr %cond.i, i64 0, i32 4
  store ptr %call52, ptr %pool, align 8
  %14 = load i64, ptr getelementptr inbounds (%struct.description, ptr @model_description, i64 0, i32 10), align 8
  %15 = mul i64 %14, 192
  %mul54 = add i64 %15, 192
  %call55 = call fastcc ptr @aligned_zeros(i64 %mul54)
  %steps = getelementptr inbounds %struct.model, ptr %cond.i, i64 0, i32 5
  store ptr %call55, ptr %steps, align 8
  %16 = load i64, ptr getelementptr inbounds (%struct.description, ptr @model_description, i64 0, i32 8), align 8
  %mul56 = shl i64 %16, 5
  %call57 = call fastcc ptr @aligned_zeros(i64 %mul56)
  %strides = getelementptr inbounds %struct.model, ptr %cond.i, i64 0, i32 11
  store ptr %call57, ptr %strides, align 8
  %17 = load i64, ptr %num_threads, align 8
  %mul59 = shl i64 %17, 3
  %call60 = call fastcc ptr @aligned_zeros(i64 %mul59)
  %workers = getelementptr inbounds %struct.model, ptr %cond.i, i64 0, i32 10
  store ptr %call60, ptr %workers, align 8
  %18 = load ptr, ptr %pool, align 8
  %tobool62.not = icmp eq ptr %18, null
  br i1 %tobool62.not, label %if.then74, label %lor.lhs.false63

lor.lhs.false63:
  %19 = load ptr, ptr %steps, align 8
  %tobool65.not = icmp eq ptr %19, null
  br i1 %tobool65.not, label %if.then74, label %lor.lhs.false66

lor.lhs.false66:
  %20 = load ptr, ptr %strides, align 8
  %tobool68.not = icmp eq ptr %20, null
  %tobool71.not = icmp eq ptr %call60, null
  %or.cond142 = select i1 %tobool68.not, i1 true, i1 %tobool71.not
  br i1 %or.cond142, label %if.then74, label %lor.lhs.false72

lor.lhs.false72:
  %call73 = call fastcc zeroext i1 @map_arena(ptr %cond.i)
  br i1 %call73, label %if.end76, label %if.then74

if.then74:
  store atomic i64 ptrtoint (ptr @.str.4 to i64), ptr @error_without_handle seq_cst, align 8
  call void @model_destroy(ptr %cond.i)
  br label %cleanup

if.end76:
  call fastcc void @fill_steps(ptr %cond.i, ptr %data.0)
  %21 = load i64, ptr %num_threads, align 8
  %22 = load ptr, ptr %pool, align 8
  %num_threads79 = getelementptr inbounds %struct.thread_pool, ptr %22, i64 0, i32 6
  store i64 %21, ptr %num_threads79, align 16
  %avoided_cpu = getelementptr inbounds %struct.thread_pool, ptr %22, i64 0, i32 12
  store i64 -1, ptr %avoided_cpu, align 64
  %23 = load ptr, ptr %steps, align 8
  %steps83 = getelementptr inbounds %struct.thread_pool, ptr %22, i64 0, i32 4
  store ptr %23, ptr %steps83, align 64
  %24 = load ptr, ptr %pool, align 8
  br label %for.body

for.cond.cleanup:
  %call89 = call fastcc zeroext i1 @start_workers(ptr %cond.i)
  br i1 %call89, label %if.end92, label %if.then90

for.body:
  %indvars.iv = phi i64 [ 0, %if.end76 ], [ %indvars.iv.next, %for.body ]
  %arrayidx = getelementptr inbounds [16 x i64], ptr %processors, i64 0, i64 %indvars.iv
  %25 = load i64, ptr %arrayidx, align 8
  %arrayidx88 = getelementptr inbounds %struct.thread_pool, ptr %24, i64 0, i32 15, i64 %indvars.iv
  store i64 %25, ptr %arrayidx88, align 8
  %indvars.iv.next = add nuw nsw i64 %indvars.iv, 1
  %exitcond.not = icmp eq i64 %indvars.iv.next, 16
  br i1 %exitcond.not, label %for.cond.cleanup, label %for.body

if.then90:
  store atomic i64 ptrtoint (ptr @.str.6 to i64), ptr @error_without_handle seq_cst, align 8
  call void @model_destroy(ptr %cond.i)
  br label %cleanup

if.end92:
  store ptr %cond.i, ptr %out, align 8
  br label %cleanup

cleanup:
  %retval.0 = phi i32 [ 0, %if.end92 ], [ 6, %if.then90 ], [ 2, %if.then74 ]
  br label %return

return:
  %retval.3 = phi i32 [ 3, %if.then2 ], [ 1, %if.then8 ], [ 1, %if.then13 ], [ 5, %if.then19 ], [ 1, %if.then ], [ 2, %if.then24 ], [ %retval.0, %cleanup ], [ 5, %if.then31 ]
  ret i32 %retval.3
}

define internal fastcc ptr @aligned_zeros(i64 %bytes) nounwind {
entry:
  %memory = alloca ptr, align 8
  store ptr null, ptr %memory, align 8
  %call = call i32 @posix_memalign(ptr %memory, i64 64, i64 %bytes)
  %tobool.not = icmp eq i32 %call, 0
  br i1 %tobool.not, label %cond.false, label %cond.end

cond.false:
  %0 = load ptr, ptr %memory, align 8
  %call1 = call ptr @memset(ptr %0, i32 0, i64 %bytes)
  br label %cond.end

cond.end:
  %cond = phi ptr [ %call1, %cond.false ], [ null, %entry ]
  ret ptr %cond
}

define internal fastcc ptr @map_weights(ptr %handle, ptr %path) nounwind {
entry:
  %0 = load i64, ptr getelementptr inbounds (%struct.description, ptr @model_description, i64 0, i32 2), align 8
  %add = add i64 %0, 64
  %call = tail call i32 (ptr, i32, ...) @open(ptr %path, i32 524288)
  %cmp = icmp slt i32 %call, 0
  br i1 %cmp, label %cleanup14, label %if.end

if.end:
  %call1 = tail call i64 @lseek(i32 %call, i64 0, i32 2)
  %cmp2 = icmp eq i64 %call1, %add
  br i1 %cmp2, label %if.then3, label %if.end5

if.then3:
  %call4 = tail call ptr @mmap(ptr null, i64 %add, i32 1, i32 2, i32 %call, i64 0)
  br label %if.end5

if.end5:
  %mapping.0 = phi ptr [ %call4, %if.then3 ], [ inttoptr (i64 -1 to ptr), %if.end ]
  %call6 = tail call i32 @close(i32 %call)
  %cmp7 = icmp eq ptr %mapping.0, inttoptr (i64 -1 to ptr)
  br i1 %cmp7, label %cleanup14, label %if.end9

if.end9:
  %weights_mapping = getelementptr inbounds %struct.model, ptr %handle, i64 0, i32 9
  store ptr %mapping.0, ptr %weights_mapping, align 8
  %call10 = tail call i32 @memcmp(ptr %mapping.0, ptr getelementptr inbounds (%struct.description, ptr @model_description, i64 0, i32 1), i64 32)
  %cmp11.not = icmp eq i32 %call10, 0
  %add.ptr = getelementptr inbounds i8, ptr %mapping.0, i64 64
  %spec.select = select i1 %cmp11.not, ptr %add.ptr, ptr null
  br label %cleanup14

cleanup14:
  %retval.1 = phi ptr [ null, %entry ], [ null, %if.end5 ], [ %spec.select, %if.end9 ]
  ret ptr %retval.1
}

define internal fastcc i64 @allowed_processors(ptr %mask) nounwind {
entry:
  %call = tail call ptr @memset(ptr %mask, i32 0, i64 128)
  %call1 = tail call i32 @sched_getaffinity(i32 0, i64 128, ptr %mask)
  %cmp = icmp eq i32 %call1, 0
  br i1 %cmp, label %for.body, label %if.end

for.body:
  %indvars.iv = phi i64 [ %indvars.iv.next, %for.cond.cleanup4 ], [ 0, %entry ]
  %count.021 = phi i64 [ %count.1.lcssa, %for.cond.cleanup4 ], [ 0, %entry ]
  %arrayidx = getelementptr inbounds i64, ptr %mask, i64 %indvars.iv
  %0 = load i64, ptr %arrayidx, align 8
  %tobool.not18 = icmp eq i64 %0, 0
  br i1 %tobool.not18, label %for.cond.cleanup4, label %for.body5

for.cond.cleanup4:
  %count.1.lcssa = phi i64 [ %count.021, %for.body ], [ %inc, %for.body5 ]
  %indvars.iv.next = add nuw nsw i64 %indvars.iv, 1
  %exitcond.not = icmp eq i64 %indvars.iv.next, 16
  br i1 %exitcond.not, label %if.end, label %for.body

for.body5:
  %bits.020 = phi i64 [ %and, %for.body5 ], [ %0, %for.body ]
  %count.119 = phi i64 [ %inc, %for.body5 ], [ %count.021, %for.body ]
  %inc = add i64 %count.119, 1
  %sub = add i64 %bits.020, -1
  %and = and i64 %sub, %bits.020
  %tobool.not = icmp eq i64 %and, 0
  br i1 %tobool.not, label %for.cond.cleanup4, label %for.body5

if.end:
  %count.2 = phi i64 [ 0, %entry ], [ %count.1.lcssa, %for.cond.cleanup4 ]
  %tobool9.not = icmp eq i64 %count.2, 0
  %cond = select i1 %tobool9.not, i64 1, i64 %count.2
  ret i64 %cond
}

declare i32 @getpid()

define internal fastcc zeroext i1 @map_arena(ptr %handle) nounwind {
entry:
  %0 = load i64, ptr getelementptr inbounds (%struct.description, ptr @model_description, i64 0, i32 7), align 8
  %sub = add i64 %0, 2097151
  %div17 = and i64 %sub, -2097152
  %add1 = add i64 %div17, 2097152
  %call = tail call ptr @mmap(ptr null, i64 %add1, i32 3, i32 34, i32 -1, i64 0)
  %cmp = icmp ne ptr %call, inttoptr (i64 -1 to ptr)
  br i1 %cmp, label %if.end, label %cleanup

if.end:
  %arena_mapping = getelementptr inbounds %struct.model, ptr %handle, i64 0, i32 8
  store ptr %call, ptr %arena_mapping, align 8
  %arena_mapped = getelementptr inbounds %struct.model, ptr %handle, i64 0, i32 7
  store i64 %add1, ptr %arena_mapped, align 8
  %1 = ptrtoint ptr %call to i64
  %sub3 = add i64 %1, 2097151
  %div418 = and i64 %sub3, -2097152
  %2 = inttoptr i64 %div418 to ptr
  %arena = getelementptr inbounds %struct.model, ptr %handle, i64 0, i32 6
  store ptr %2, ptr %arena, align 8
  %call8 = tail call i32 @madvise(ptr %2, i64 %div17, i32 14)
  br label %cleanup

cleanup:
  ret i1 %cmp
}

define internal fastcc void @fill_steps(ptr %handle, ptr %weights) nounwind {
entry:
  %0 = load i64, ptr getelementptr inbounds (%struct.description, ptr @model_description, i64 0, i32 13), align 8
  %add.ptr.i = getelementptr inbounds i8, ptr @model_description, i64 %0
  %1 = load i64, ptr getelementptr inbounds (%struct.description, ptr @model_description, i64 0, i32 10), align 8
  %cmp72.not = icmp eq i64 %1, 0
  br i1 %cmp72.not, label %for.cond.cleanup, label %for.body.lr.ph

for.body.lr.ph:
  %steps1 = getelementptr inbounds %struct.model, ptr %handle, i64 0, i32 5
  %2 = load ptr, ptr %steps1, align 8
  %arena = getelementptr inbounds %struct.model, ptr %handle, i64 0, i32 6
  %arena7 = getelementptr inbounds %struct.model, ptr %handle, i64 0, i32 6
  %3 = load ptr, ptr %arena7, align 8
  %strides = getelementptr inbounds %struct.model, ptr %handle, i64 0, i32 11
  br label %for.body

for.cond.cleanup:
  %steps35 = getelementptr inbounds %struct.model, ptr %handle, i64 0, i32 5
  %4 = load ptr, ptr %steps35, align 8
  %items_per_block37 = getelementptr inbounds %struct.step, ptr %4, i64 %1, i32 6
  store i64 1, ptr %items_per_block37, align 16
  ret void

for.body:
  %index.073 = phi i64 [ 0, %for.body.lr.ph ], [ %inc, %cond.end25 ]
  %arrayidx = getelementptr inbounds %struct.step_description, ptr %add.ptr.i, i64 %index.073
  %arrayidx2 = getelementptr inbounds %struct.step, ptr %2, i64 %index.073
  %5 = load i64, ptr %arrayidx, align 8
  %arrayidx3 = getelementptr inbounds [0 x ptr], ptr @model_kernels, i64 0, i64 %5
  %6 = load ptr, ptr %arrayidx3, align 8
  store ptr %6, ptr %arrayidx2, align 64
  %source = getelementptr inbounds %struct.step_description, ptr %add.ptr.i, i64 %index.073, i32 1
  %7 = load i64, ptr %source, align 8
  %cmp4 = icmp eq i64 %7, -1
  br i1 %cmp4, label %cond.end, label %cond.false

cond.false:
  %8 = load ptr, ptr %arena, align 8
  %add.ptr = getelementptr inbounds i8, ptr %8, i64 %7
  br label %cond.end

cond.end:
  %cond = phi ptr [ %add.ptr, %cond.false ], [ null, %for.body ]
  %source6 = getelementptr inbounds %struct.step, ptr %2, i64 %index.073, i32 1
  store ptr %cond, ptr %source6, align 8
  %target = getelementptr inbounds %struct.step_description, ptr %add.ptr.i, i64 %index.073, i32 2
  %9 = load i64, ptr %target, align 8
  %add.ptr8 = getelementptr inbounds i8, ptr %3, i64 %9
  %target9 = getelementptr inbounds %struct.step, ptr %2, i64 %index.073, i32 2
  store ptr %add.ptr8, ptr %target9, align 16
  %weights_kind = getelementptr inbounds %struct.step_description, ptr %add.ptr.i, i64 %index.073, i32 3
  %10 = load i64, ptr %weights_kind, align 8
  switch i64 %10, label %cond.false21 [
    i64 0, label %cond.true11
    i64 1, label %cond.true17
  ]

cond.true11:
  %weights12 = getelementptr inbounds %struct.step_description, ptr %add.ptr.i, i64 %index.073, i32 4
  %11 = load i64, ptr %weights12, align 8
  %add.ptr13 = getelementptr inbounds i8, ptr %weights, i64 %11
  br label %cond.end25

cond.true17:
  %weights19 = getelementptr inbounds %struct.step_description, ptr %add.ptr.i, i64 %index.073, i32 4
  %12 = load i64, ptr %weights19, align 8
  %add.ptr20 = getelementptr inbounds i8, ptr %3, i64 %12
  br label %cond.end25

cond.false21:
  %13 = load ptr, ptr %strides, align 8
  %input = getelementptr inbounds %struct.step_description, ptr %add.ptr.i, i64 %index.073, i32 11
  %14 = load i64, ptr %input, align 8
  %arrayidx22 = getelementptr inbounds [4 x i64], ptr %13, i64 %14
  br label %cond.end25

cond.end25:
  %cond26 = phi ptr [ %add.ptr13, %cond.true11 ], [ %add.ptr20, %cond.true17 ], [ %arrayidx22, %cond.false21 ]
  %weights27 = getelementptr inbounds %struct.step, ptr %2, i64 %index.073, i32 3
  store ptr %cond26, ptr %weights27, align 8
  %bias = getelementptr inbounds %struct.step_description, ptr %add.ptr.i, i64 %index.073, i32 5
  %15 = load i64, ptr %bias, align 8
  %add.ptr28 = getelementptr inbounds i8, ptr %weights, i64 %15
  %bias29 = getelementptr inbounds %struct.step, ptr %2, i64 %index.073, i32 4
  store ptr %add.ptr28, ptr %bias29, align 32
  %units_per_block = getelementptr inbounds %struct.step_description, ptr %add.ptr.i, i64 %index.073, i32 6
  %16 = load i64, ptr %units_per_block, align 8
  %units_per_block30 = getelementptr inbounds %struct.step, ptr %2, i64 %index.073, i32 5
  store i64 %16, ptr %units_per_block30, align 8
  %items_per_block = getelementptr inbounds %struct.step_description, ptr %add.ptr.i, i64 %index.073, i32 7
  %17 = load i64, ptr %items_per_block, align 8
  %items_per_block31 = getelementptr inbounds %struct.step, ptr %2, i64 %index.073, i32 6
  store i64 %17, ptr %items_per_block31, align 16
  %items_per_image = getelementptr inbounds %struct.step_description, ptr %add.ptr.i, i64 %index.073, i32 8
  %18 = load i64, ptr %items_per_image, align 8
  %items_per_image32 = getelementptr inbounds %struct.step, ptr %2, i64 %index.073, i32 11
  store i64 %18, ptr %items_per_image32, align 8
  %first_image = getelementptr inbounds %struct.step_description, ptr %add.ptr.i, i64 %index.073, i32 9
  %19 = load i64, ptr %first_image, align 8
  %first_image33 = getelementptr inbounds %struct.step, ptr %2, i64 %index.073, i32 12
  store i64 %19, ptr %first_image33, align 16
  %max_images = getelementptr inbounds %struct.step_description, ptr %add.ptr.i, i64 %index.073, i32 10
  %20 = load i64, ptr %max_images, align 8
  %max_images34 = getelementptr inbounds %struct.step, ptr %2, i64 %index.073, i32 13
  store i64 %20, ptr %max_images34, align 8
  %inc = add nuw i64 %index.073, 1
  %exitcond.not = icmp eq i64 %inc, %1
  br i1 %exitcond.not, label %for.cond.cleanup, label %for.body
}

define internal fastcc zeroext i1 @start_workers(ptr %handle) nounwind {
entry:
  %attributes = alloca %union.thread_attributes, align 8
  %all = alloca %union.signal_set, align 8
  %before = alloca %union.signal_set, align 8
  %call = call ptr @memset(ptr %all, i32 255, i64 128)
  %call1 = call i32 @pthread_attr_init(ptr %attributes)
  %tobool.not = icmp eq i32 %call1, 0
  br i1 %tobool.not, label %if.end, label %cleanup

if.end:
  %call2 = call i32 @pthread_attr_setstacksize(ptr %attributes, i64 4194304)
  %call3 = call i32 @pthread_sigmask(i32 2, ptr %all, ptr %before)
  %workers = getelementptr inbounds %struct.model, ptr %handle, i64 0, i32 10
  %num_started = getelementptr inbounds %struct.model, ptr %handle, i64 0, i32 3
  %num_threads = getelementptr inbounds %struct.model, ptr %handle, i64 0, i32 2
  %0 = load i64, ptr %num_started, align 8
  %1 = load i64, ptr %num_threads, align 8
  %sub23 = add i64 %1, -1
  %cmp24 = icmp ult i64 %0, %sub23
  br i1 %cmp24, label %land.rhs.lr.ph, label %while.end

land.rhs.lr.ph:
  %pool = getelementptr inbounds %struct.model, ptr %handle, i64 0, i32 4
  br label %land.rhs

land.rhs:
  %2 = phi i64 [ %0, %land.rhs.lr.ph ], [ %inc, %while.body ]
  %3 = load ptr, ptr %workers, align 8
  %arrayidx = getelementptr inbounds i64, ptr %3, i64 %2
  %4 = load ptr, ptr %pool, align 8
  %call5 = call i32 @pthread_create(ptr %arrayidx, ptr %attributes, ptr @run_worker, ptr %4)
  %cmp6 = icmp eq i32 %call5, 0
  br i1 %cmp6, label %while.body, label %while.end

while.body:
  %5 = load i64, ptr %num_started, align 8
  %inc = add i64 %5, 1
  store i64 %inc, ptr %num_started, align 8
  %6 = load i64, ptr %num_threads, align 8
  %sub = add i64 %6, -1
  %cmp = icmp ult i64 %inc, %sub
  br i1 %cmp, label %land.rhs, label %while.end

while.end:
  %num_threads.le = getelementptr inbounds %struct.model, ptr %handle, i64 0, i32 2
  %call8 = call i32 @pthread_sigmask(i32 2, ptr %before, ptr null)
  %call9 = call i32 @pthread_attr_destroy(ptr %attributes)
  %7 = load i64, ptr %num_started, align 8
  %8 = load i64, ptr %num_threads.le, align 8
  %sub12 = add i64 %8, -1
  %cmp13 = icmp eq i64 %7, %sub12
  br label %cleanup

cleanup:
  %retval.0 = phi i1 [ %cmp13, %while.end ], [ false, %entry ]
  ret i1 %retval.0
}

define void @model_destroy(ptr %handle) nounwind {
entry:
  %tobool.not = icmp eq ptr %handle, null
  br i1 %tobool.not, label %return, label %if.end

if.end:
  %num_started = getelementptr inbounds %struct.model, ptr %handle, i64 0, i32 3
  %0 = load i64, ptr %num_started, align 8
  %tobool1.not = icmp eq i64 %0, 0
  br i1 %tobool1.not, label %if.end6, label %land.lhs.true

land.lhs.true:
  %process = getelementptr inbounds %struct.model, ptr %handle, i64 0, i32 1
  %1 = load i32, ptr %process, align 4
  %call = tail call i32 @getpid()
  %cmp = icmp eq i32 %1, %call
  br i1 %cmp, label %if.then2, label %if.end6

if.then2:
  %pool = getelementptr inbounds %struct.model, ptr %handle, i64 0, i32 4
  %2 = load ptr, ptr %pool, align 8
  tail call void @pool_shutdown(ptr %2)
  %3 = load i64, ptr %num_started, align 8
  %cmp437.not = icmp eq i64 %3, 0
  br i1 %cmp437.not, label %if.end6, label %for.body.lr.ph

for.body.lr.ph:
  %workers = getelementptr inbounds %struct.model, ptr %handle, i64 0, i32 10
  br label %for.body

for.body:
  %index.038 = phi i64 [ 0, %for.body.lr.ph ], [ %inc, %for.body ]
  %4 = load ptr, ptr %workers, align 8
  %arrayidx = getelementptr inbounds i64, ptr %4, i64 %index.038
  %5 = load i64, ptr %arrayidx, align 8
  %call5 = tail call i32 @pthread_join(i64 %5, ptr null)
  %inc = add nuw i64 %index.038, 1
  %6 = load i64, ptr %num_started, align 8
  %cmp4 = icmp ult i64 %inc, %6
  br i1 %cmp4, label %for.body, label %if.end6

if.end6:
  %arena_mapping = getelementptr inbounds %struct.model, ptr %handle, i64 0, i32 8
  %7 = load ptr, ptr %arena_mapping, align 8
  %tobool7.not = icmp eq ptr %7, null
  br i1 %tobool7.not, label %if.end11, label %if.then8

if.then8:
  %arena_mapped = getelementptr inbounds %struct.model, ptr %handle, i64 0, i32 7
  %8 = load i64, ptr %arena_mapped, align 8
  %call10 = tail call i32 @munmap(ptr %7, i64 %8)
  br label %if.end11

if.end11:
  %weights_mapping = getelementptr inbounds %struct.model, ptr %handle, i64 0, i32 9
  %9 = load ptr, ptr %weights_mapping, align 8
  %tobool12.not = icmp eq ptr %9, null
  br i1 %tobool12.not, label %if.end16, label %if.then13

if.then13:
  %10 = load i64, ptr getelementptr inbounds (%struct.description, ptr @model_description, i64 0, i32 2), align 8
  %add = add i64 %10, 64
  %call15 = tail call i32 @munmap(ptr %9, i64 %add)
  br label %if.end16

if.end16:
  %pool17 = getelementptr inbounds %struct.model, ptr %handle, i64 0, i32 4
  %11 = load ptr, ptr %pool17, align 8
  tail call void @free(ptr %11)
  %steps = getelementptr inbounds %struct.model, ptr %handle, i64 0, i32 5
  %12 = load ptr, ptr %steps, align 8
  tail call void @free(ptr %12)
  %strides = getelementptr inbounds %struct.model, ptr %handle, i64 0, i32 11
  %13 = load ptr, ptr %strides, align 8
  tail call void @free(ptr %13)
  %workers18 = getelementptr inbounds %struct.model, ptr %handle, i64 0, i32 10
  %14 = load ptr, ptr %workers18, align 8
  tail call void @free(ptr %14)
  tail call void @free(ptr %handle)
  br label %return

return:
  ret void
}

declare void @pool_shutdown(ptr noundef)

declare i32 @pthread_join(i64 noundef, ptr noundef)

declare i32 @munmap(ptr noundef, i64 noundef)

declare void @free(ptr noundef)

define i32 @model_run_strided(ptr %handle, i64 %images, ptr %inputs, ptr %strides, ptr %outputs) nounwind {
entry:
  %packed = alloca [4 x i64], align 16
  %tobool.not = icmp eq ptr %handle, null
  br i1 %tobool.not, label %if.then, label %if.end

if.then:
  store atomic i64 ptrtoint (ptr @.str.7 to i64), ptr @error_without_handle seq_cst, align 8
  br label %return

if.end:
  %0 = atomicrmw xchg ptr %handle, i32 1 acquire, align 4
  %tobool1.not = icmp eq i32 %0, 0
  br i1 %tobool1.not, label %if.end3, label %return

if.end3:
  %cmp.i = icmp slt i64 %images, 0
  br i1 %cmp.i, label %why_unfit.exit, label %if.end.i

if.end.i:
  %tobool.i = icmp ne ptr %inputs, null
  %tobool1.i = icmp ne ptr %outputs, null
  %or.cond.i = and i1 %tobool.i, %tobool1.i
  br i1 %or.cond.i, label %for.cond.preheader.i, label %why_unfit.exit

for.cond.preheader.i:
  %tobool4.i = icmp ne i64 %images, 0
  %1 = load i64, ptr getelementptr inbounds (%struct.description, ptr @model_description, i64 0, i32 8), align 8
  %cmp541.i = icmp ne i64 %1, 0
  %2 = select i1 %tobool4.i, i1 %cmp541.i, i1 false
  br i1 %2, label %for.body.i.preheader, label %for.cond9.preheader.i

for.body.i.preheader:
  %3 = load ptr, ptr %inputs, align 8
  %tobool.i.i138 = icmp ne ptr %3, null
  %4 = ptrtoint ptr %3 to i64
  %rem.i.i139 = and i64 %4, 3
  %cmp.i.i140 = icmp eq i64 %rem.i.i139, 0
  %5 = and i1 %tobool.i.i138, %cmp.i.i140
  br i1 %5, label %for.cond.i.lr.ph, label %cleanup.i

for.cond.i.lr.ph:
  br i1 %tobool4.i, label %for.cond.i.preheader, label %for.cond9.preheader.i

for.cond.i.preheader:
  %6 = add i64 %1, -1
  br label %for.cond.i

for.cond.i:
  %index.042.i141 = phi i64 [ %inc.i, %for.body.i ], [ 0, %for.cond.i.preheader ]
  %exitcond.not = icmp eq i64 %index.042.i141, %6
  br i1 %exitcond.not, label %for.cond9.preheader.i, label %for.body.i

for.body.i:
  %inc.i = add nuw i64 %index.042.i141, 1
  %arrayidx.i = getelementptr inbounds ptr, ptr %inputs, i64 %inc.i
  %7 = load ptr, ptr %arrayidx.i, align 8
  %tobool.i.i = icmp ne ptr %7, null
  %8 = ptrtoint ptr %7 to i64
  %rem.i.i = and i64 %8, 3
  %cmp.i.i = icmp eq i64 %rem.i.i, 0
  %9 = and i1 %tobool.i.i, %cmp.i.i
  br i1 %9, label %for.cond.i, label %cleanup.i.loopexit

cleanup.i.loopexit:
  %cmp5.i = icmp ult i64 %inc.i, %1
  br label %cleanup.i

cleanup.i:
  %.lcssa136 = phi i1 [ %2, %for.body.i.preheader ], [ %cmp5.i, %cleanup.i.loopexit ]
  br i1 %.lcssa136, label %why_unfit.exit, label %for.cond9.preheader.i

for.cond9.preheader.i:
  %10 = load i64, ptr getelementptr inbounds (%struct.description, ptr @model_description, i64 0, i32 9), align 8
  %cmp1243.i = icmp ne i64 %10, 0
  %11 = select i1 %tobool4.i, i1 %cmp1243.i, i1 false
  br i1 %11, label %for.body15.i, label %why_unfit.exit

for.cond9.i:
  %inc21.i = add nuw i64 %index8.044.i, 1
  %cmp12.i = icmp ult i64 %inc21.i, %10
  %12 = select i1 %tobool4.i, i1 %cmp12.i, i1 false
  br i1 %12, label %for.body15.i, label %why_unfit.exit

for.body15.i:
  %index8.044.i = phi i64 [ %inc21.i, %for.cond9.i ], [ 0, %for.cond9.preheader.i ]
  %arrayidx16.i = getelementptr inbounds ptr, ptr %outputs, i64 %index8.044.i
  %13 = load ptr, ptr %arrayidx16.i, align 8
  %tobool.i35.i = icmp ne ptr %13, null
  %14 = ptrtoint ptr %13 to i64
  %rem.i36.i = and i64 %14, 3
  %cmp.i37.i = icmp eq i64 %rem.i36.i, 0
  %15 = and i1 %tobool.i35.i, %cmp.i37.i
  br i1 %15, label %for.cond9.i, label %why_unfit.exit

why_unfit.exit:
  %tobool5.not = phi i1 [ false, %if.end3 ], [ false, %if.end.i ], [ false, %cleanup.i ], [ true, %for.cond9.preheader.i ], [ %15, %for.body15.i ], [ %15, %for.cond9.i ]
  %retval.2.i = phi ptr [ @.str.14, %if.end3 ], [ @.str.15, %if.end.i ], [ @.str.16, %cleanup.i ], [ null, %for.cond9.preheader.i ], [ null, %for.cond9.i ], [ @.str.17, %for.body15.i ]
  br i1 %tobool5.not, label %if.else, label %if.then6

if.then6:
  %error = getelementptr inbounds %struct.model, ptr %handle, i64 0, i32 12
  %call7 = tail call i32 (ptr, i64, ptr, ...) @snprintf(ptr %error, i64 200, ptr @.str.8, ptr %retval.2.i)
  br label %if.end15

if.else:
  %16 = load i64, ptr getelementptr inbounds (%struct.description, ptr @model_description, i64 0, i32 6), align 8
  %cmp = icmp ult i64 %16, %images
  %error9 = getelementptr inbounds %struct.model, ptr %handle, i64 0, i32 12
  br i1 %cmp, label %if.then8, label %if.else12

if.then8:
  %call11 = tail call i32 (ptr, i64, ptr, ...) @snprintf(ptr %error9, i64 200, ptr @.str.9, i64 %16, i64 %images)
  br label %if.end15

if.else12:
  store i8 0, ptr %error9, align 8
  br label %if.end15

if.end15:
  %cmp16 = phi i1 [ false, %if.then8 ], [ true, %if.else12 ], [ false, %if.then6 ]
  %status.0 = phi i32 [ 1, %if.then8 ], [ 0, %if.else12 ], [ 1, %if.then6 ]
  %cmp17 = icmp sgt i64 %images, 0
  %or.cond = and i1 %cmp17, %cmp16
  br i1 %or.cond, label %if.then18, label %if.end82

if.then18:
  %17 = load i64, ptr getelementptr inbounds (%struct.description, ptr @model_description, i64 0, i32 13), align 8
  %add.ptr.i = getelementptr inbounds i8, ptr @model_description, i64 %17
  %18 = load i64, ptr getelementptr inbounds (%struct.description, ptr @model_description, i64 0, i32 8), align 8
  %cmp20143.not = icmp eq i64 %18, 0
  br i1 %cmp20143.not, label %for.cond48.preheader, label %for.body.lr.ph

for.body.lr.ph:
  %19 = load i64, ptr getelementptr inbounds (%struct.description, ptr @model_description, i64 0, i32 11), align 8
  %add.ptr.i.i = getelementptr inbounds i8, ptr @model_description, i64 %19
  %arrayinit.element = getelementptr inbounds i64, ptr %packed, i64 1
  %arrayinit.element28 = getelementptr inbounds i64, ptr %packed, i64 2
  %arrayinit.element30 = getelementptr inbounds i64, ptr %packed, i64 3
  %tobool35.not = icmp eq ptr %strides, null
  %strides40 = getelementptr inbounds %struct.model, ptr %handle, i64 0, i32 11
  %20 = load ptr, ptr %strides40, align 8
  br label %for.body

for.cond48.preheader:
  %21 = load i64, ptr getelementptr inbounds (%struct.description, ptr @model_description, i64 0, i32 10), align 8
  %cmp49145.not = icmp eq i64 %21, 0
  br i1 %cmp49145.not, label %for.cond.cleanup50, label %for.body51.lr.ph

for.body51.lr.ph:
  %strides58 = getelementptr inbounds %struct.model, ptr %handle, i64 0, i32 11
  %steps64 = getelementptr inbounds %struct.model, ptr %handle, i64 0, i32 5
  br label %for.body51

for.body:
  %index.0144 = phi i64 [ 0, %for.body.lr.ph ], [ %inc45, %for.cond.cleanup33 ]
  %add.ptr.i131 = getelementptr inbounds %struct.input, ptr %add.ptr.i.i, i64 %index.0144
  %arrayidx24 = getelementptr inbounds i64, ptr %add.ptr.i131, i64 1
  %22 = load i64, ptr %arrayidx24, align 8
  %arrayidx25 = getelementptr inbounds i64, ptr %add.ptr.i131, i64 2
  %23 = load i64, ptr %arrayidx25, align 8
  %mul = mul i64 %23, %22
  %24 = load i64, ptr %add.ptr.i131, align 8
  %mul27 = mul nsw i64 %24, %mul
  store i64 %mul27, ptr %packed, align 16
  store i64 %mul, ptr %arrayinit.element, align 8
  store i64 %23, ptr %arrayinit.element28, align 16
  store i64 1, ptr %arrayinit.element30, align 8
  br label %for.body34

for.cond.cleanup33:
  %inc45 = add nuw i64 %index.0144, 1
  %exitcond153.not = icmp eq i64 %inc45, %18
  br i1 %exitcond153.not, label %for.cond48.preheader, label %for.body

for.body34:
  %indvars.iv = phi i64 [ 0, %for.body ], [ %indvars.iv.next, %for.body34 ]
  %arrayidx37 = getelementptr inbounds [4 x i64], ptr %strides, i64 %index.0144, i64 %indvars.iv
  %arrayidx39 = getelementptr inbounds [4 x i64], ptr %packed, i64 0, i64 %indvars.iv
  %cond.in = select i1 %tobool35.not, ptr %arrayidx39, ptr %arrayidx37
  %cond = load i64, ptr %cond.in, align 8
  %arrayidx43 = getelementptr inbounds [4 x i64], ptr %20, i64 %index.0144, i64 %indvars.iv
  store i64 %cond, ptr %arrayidx43, align 8
  %indvars.iv.next = add nuw nsw i64 %indvars.iv, 1
  %exitcond152.not = icmp eq i64 %indvars.iv.next, 4
  br i1 %exitcond152.not, label %for.cond.cleanup33, label %for.body34

for.cond.cleanup50:
  %pool = getelementptr inbounds %struct.model, ptr %handle, i64 0, i32 4
  %25 = load ptr, ptr %pool, align 8
  %steps71 = getelementptr inbounds %struct.model, ptr %handle, i64 0, i32 5
  %26 = load ptr, ptr %steps71, align 8
  tail call void @pool_run(ptr %25, ptr %26, i64 %21, i64 %images)
  %27 = load i64, ptr getelementptr inbounds (%struct.description, ptr @model_description, i64 0, i32 9), align 8
  %cmp74148.not = icmp eq i64 %27, 0
  br i1 %cmp74148.not, label %if.end82, label %for.body76.lr.ph

for.body76.lr.ph:
  %28 = load i64, ptr getelementptr inbounds (%struct.description, ptr @model_description, i64 0, i32 12), align 8
  %add.ptr.i.i132 = getelementptr inbounds i8, ptr @model_description, i64 %28
  %arena.i = getelementptr inbounds %struct.model, ptr %handle, i64 0, i32 6
  %29 = load ptr, ptr %arena.i, align 8
  br label %for.body76

for.body51:
  %index47.0146 = phi i64 [ 0, %for.body51.lr.ph ], [ %inc69, %for.inc68 ]
  %source = getelementptr inbounds %struct.step_description, ptr %add.ptr.i, i64 %index47.0146, i32 1
  %30 = load i64, ptr %source, align 8
  %cmp53 = icmp eq i64 %30, -1
  br i1 %cmp53, label %if.then54, label %for.inc68

if.then54:
  %input = getelementptr inbounds %struct.step_description, ptr %add.ptr.i, i64 %index47.0146, i32 11
  %31 = load i64, ptr %input, align 8
  %arrayidx56 = getelementptr inbounds ptr, ptr %inputs, i64 %31
  %32 = load ptr, ptr %arrayidx56, align 8
  %first_image = getelementptr inbounds %struct.step_description, ptr %add.ptr.i, i64 %index47.0146, i32 9
  %33 = load i64, ptr %first_image, align 8
  %34 = load ptr, ptr %strides58, align 8
  %arrayidx61 = getelementptr inbounds [4 x i64], ptr %34, i64 %31
  %35 = load i64, ptr %arrayidx61, align 8
  %mul63 = mul nsw i64 %35, %33
  %add.ptr = getelementptr inbounds float, ptr %32, i64 %mul63
  %36 = load ptr, ptr %steps64, align 8
  %source66 = getelementptr inbounds %struct.step, ptr %36, i64 %index47.0146, i32 1
  store ptr %add.ptr, ptr %source66, align 8
  br label %for.inc68

for.inc68:
  %inc69 = add nuw i64 %index47.0146, 1
  %exitcond154.not = icmp eq i64 %inc69, %21
  br i1 %exitcond154.not, label %for.cond.cleanup50, label %for.body51

for.body76:
  %index72.0149 = phi i64 [ 0, %for.body76.lr.ph ], [ %inc80, %copy_output.exit ]
  %add.ptr.i133 = getelementptr inbounds %struct.output, ptr %add.ptr.i.i132, i64 %index72.0149
  %arrayidx78 = getelementptr inbounds ptr, ptr %outputs, i64 %index72.0149
  %37 = load ptr, ptr %arrayidx78, align 8
  %offset.i = getelementptr inbounds %struct.output, ptr %add.ptr.i133, i64 0, i32 2
  %38 = load i64, ptr %offset.i, align 8
  %add.ptr.i134 = getelementptr inbounds float, ptr %29, i64 %38
  %extents.i = getelementptr inbounds %struct.output, ptr %add.ptr.i133, i64 0, i32 4
  %39 = load i64, ptr %extents.i, align 8
  %cmp259.not.i = icmp eq i64 %39, 0
  %arrayidx7.i = getelementptr inbounds %struct.output, ptr %add.ptr.i133, i64 0, i32 4, i64 1
  %strides.i = getelementptr inbounds %struct.output, ptr %add.ptr.i133, i64 0, i32 5
  %arrayidx14.i = getelementptr inbounds %struct.output, ptr %add.ptr.i133, i64 0, i32 5, i64 1
  %arrayidx19.i = getelementptr inbounds %struct.output, ptr %add.ptr.i133, i64 0, i32 4, i64 2
  %arrayidx24.i = getelementptr inbounds %struct.output, ptr %add.ptr.i133, i64 0, i32 5, i64 2
  %image_stride.i = getelementptr inbounds %struct.output, ptr %add.ptr.i133, i64 0, i32 3
  %40 = load i64, ptr %image_stride.i, align 8
  br label %for.cond1.preheader.i

for.cond1.preheader.i:
  %to.addr.066.i = phi ptr [ %37, %for.body76 ], [ %to.addr.1.lcssa.i, %for.cond.cleanup3.i ]
  %image.065.i = phi i64 [ 0, %for.body76 ], [ %inc34.i, %for.cond.cleanup3.i ]
  %from.064.i = phi ptr [ %add.ptr.i134, %for.body76 ], [ %add.ptr35.i, %for.cond.cleanup3.i ]
  br i1 %cmp259.not.i, label %for.cond.cleanup3.i, label %for.cond5.preheader.lr.ph.i

for.cond5.preheader.lr.ph.i:
  %41 = load i64, ptr %arrayidx7.i, align 8
  %cmp855.not.i = icmp eq i64 %41, 0
  br label %for.cond5.preheader.i

for.cond5.preheader.i:
  %to.addr.161.i = phi ptr [ %to.addr.066.i, %for.cond5.preheader.lr.ph.i ], [ %to.addr.2.lcssa.i, %for.cond.cleanup9.i ]
  %i.060.i = phi i64 [ 0, %for.cond5.preheader.lr.ph.i ], [ %inc31.i, %for.cond.cleanup9.i ]
  br i1 %cmp855.not.i, label %for.cond.cleanup9.i, label %for.body10.lr.ph.i

for.body10.lr.ph.i:
  %42 = load i64, ptr %strides.i, align 8
  %mul.i = mul i64 %42, %i.060.i
  %add.ptr12.i = getelementptr inbounds float, ptr %from.064.i, i64 %mul.i
  %43 = load i64, ptr %arrayidx14.i, align 8
  %44 = load i64, ptr %arrayidx19.i, align 8
  %cmp2052.not.i = icmp eq i64 %44, 0
  br label %for.body10.i

for.cond.cleanup3.i:
  %to.addr.1.lcssa.i = phi ptr [ %to.addr.066.i, %for.cond1.preheader.i ], [ %to.addr.2.lcssa.i, %for.cond.cleanup9.i ]
  %inc34.i = add nuw i64 %image.065.i, 1
  %add.ptr35.i = getelementptr inbounds float, ptr %from.064.i, i64 %40
  %exitcond69.not.i = icmp eq i64 %inc34.i, %images
  br i1 %exitcond69.not.i, label %copy_output.exit, label %for.cond1.preheader.i

for.cond.cleanup9.i:
  %to.addr.2.lcssa.i = phi ptr [ %to.addr.161.i, %for.cond5.preheader.i ], [ %to.addr.3.lcssa.i, %for.cond.cleanup21.i ]
  %inc31.i = add nuw i64 %i.060.i, 1
  %exitcond68.not.i = icmp eq i64 %inc31.i, %39
  br i1 %exitcond68.not.i, label %for.cond.cleanup3.i, label %for.cond5.preheader.i

for.body10.i:
  %to.addr.257.i = phi ptr [ %to.addr.161.i, %for.body10.lr.ph.i ], [ %to.addr.3.lcssa.i, %for.cond.cleanup21.i ]
  %j.056.i = phi i64 [ 0, %for.body10.lr.ph.i ], [ %inc28.i, %for.cond.cleanup21.i ]
  %mul15.i = mul i64 %j.056.i, %43
  %add.ptr16.i = getelementptr inbounds float, ptr %add.ptr12.i, i64 %mul15.i
  br i1 %cmp2052.not.i, label %for.cond.cleanup21.i, label %for.body22.lr.ph.i

for.body22.lr.ph.i:
  %45 = load i64, ptr %arrayidx24.i, align 8
  br label %for.body22.i

for.cond.cleanup21.i:
  %to.addr.3.lcssa.i = phi ptr [ %to.addr.257.i, %for.body10.i ], [ %incdec.ptr.i, %for.body22.i ]
  %inc28.i = add nuw i64 %j.056.i, 1
  %exitcond67.not.i = icmp eq i64 %inc28.i, %41
  br i1 %exitcond67.not.i, label %for.cond.cleanup9.i, label %for.body10.i

for.body22.i:
  %k.054.i = phi i64 [ 0, %for.body22.lr.ph.i ], [ %inc.i135, %for.body22.i ]
  %to.addr.353.i = phi ptr [ %to.addr.257.i, %for.body22.lr.ph.i ], [ %incdec.ptr.i, %for.body22.i ]
  %mul25.i = mul i64 %k.054.i, %45
  %arrayidx26.i = getelementptr inbounds float, ptr %add.ptr16.i, i64 %mul25.i
  %46 = load float, ptr %arrayidx26.i, align 4
  %incdec.ptr.i = getelementptr inbounds float, ptr %to.addr.353.i, i64 1
  store float %46, ptr %to.addr.353.i, align 4
  %inc.i135 = add nuw i64 %k.054.i, 1
  %exitcond.not.i = icmp eq i64 %inc.i135, %44
  br i1 %exitcond.not.i, label %for.cond.cleanup21.i, label %for.body22.i

copy_output.exit:
  %inc80 = add nuw i64 %index72.0149, 1
  %exitcond155.not = icmp eq i64 %inc80, %27
  br i1 %exitcond155.not, label %if.end82, label %for.body76

if.end82:
  store atomic i32 0, ptr %handle release, align 8
  br label %return

return:
  %retval.0 = phi i32 [ %status.0, %if.end82 ], [ 1, %if.then ], [ 4, %if.end ]
  ret i32 %retval.0
}

declare i32 @snprintf(ptr noundef, i64 noundef, ptr noundef, ...)

declare void @pool_run(ptr noundef, ptr noundef, i64 noundef, i64 noundef)

define i32 @model_run(ptr %handle, i64 %images, ptr %inputs, ptr %outputs) nounwind {
entry:
  %call = tail call i32 @model_run_strided(ptr %handle, i64 %images, ptr %inputs, ptr null, ptr %outputs)
  ret i32 %call
}

define i32 @model_threads(ptr %handle) nounwind {
entry:
  %tobool.not = icmp eq ptr %handle, null
  br i1 %tobool.not, label %cond.end, label %cond.true

cond.true:
  %num_threads = getelementptr inbounds %struct.model, ptr %handle, i64 0, i32 2
  %0 = load i64, ptr %num_threads, align 8
  %conv = trunc i64 %0 to i32
  br label %cond.end

cond.end:
  %cond = phi i32 [ %conv, %cond.true ], [ 0, %entry ]
  ret i32 %cond
}

define ptr @model_version() nounwind {
entry:
  ret ptr @model_description
}

define i64 @model_max_images() nounwind {
entry:
  %0 = load i64, ptr getelementptr inbounds (%struct.description, ptr @model_description, i64 0, i32 6), align 8
  ret i64 %0
}

define i32 @model_num_inputs() nounwind {
entry:
  %0 = load i64, ptr getelementptr inbounds (%struct.description, ptr @model_description, i64 0, i32 8), align 8
  %conv = trunc i64 %0 to i32
  ret i32 %conv
}

define i32 @model_num_outputs() nounwind {
entry:
  %0 = load i64, ptr getelementptr inbounds (%struct.description, ptr @model_description, i64 0, i32 9), align 8
  %conv = trunc i64 %0 to i32
  ret i32 %conv
}

define i32 @model_input_shape(i32 %input, ptr %shape) nounwind {
entry:
  %cmp = icmp slt i32 %input, 0
  br i1 %cmp, label %return, label %lor.lhs.false

lor.lhs.false:
  %0 = load i64, ptr getelementptr inbounds (%struct.description, ptr @model_description, i64 0, i32 8), align 8
  %conv.i = trunc i64 %0 to i32
  %cmp1 = icmp sgt i32 %conv.i, %input
  %tobool = icmp ne ptr %shape, null
  %or.cond = and i1 %tobool, %cmp1
  br i1 %or.cond, label %for.cond.preheader, label %return

for.cond.preheader:
  %conv = zext i32 %input to i64
  %1 = load i64, ptr getelementptr inbounds (%struct.description, ptr @model_description, i64 0, i32 11), align 8
  %add.ptr.i.i = getelementptr inbounds i8, ptr @model_description, i64 %1
  %add.ptr.i = getelementptr inbounds %struct.input, ptr %add.ptr.i.i, i64 %conv
  br label %for.body

for.body:
  %indvars.iv = phi i64 [ 0, %for.cond.preheader ], [ %indvars.iv.next, %for.body ]
  %arrayidx = getelementptr inbounds [3 x i64], ptr %add.ptr.i, i64 0, i64 %indvars.iv
  %2 = load i64, ptr %arrayidx, align 8
  %arrayidx7 = getelementptr inbounds i64, ptr %shape, i64 %indvars.iv
  store i64 %2, ptr %arrayidx7, align 8
  %indvars.iv.next = add nuw nsw i64 %indvars.iv, 1
  %exitcond.not = icmp eq i64 %indvars.iv.next, 3
  br i1 %exitcond.not, label %return, label %for.body

return:
  %retval.0 = phi i32 [ 0, %lor.lhs.false ], [ 0, %entry ], [ 3, %for.body ]
  ret i32 %retval.0
}

define i32 @model_output_shape(i32 %output, ptr %shape) nounwind {
entry:
  %cmp = icmp slt i32 %output, 0
  br i1 %cmp, label %return, label %lor.lhs.false

lor.lhs.false:
  %0 = load i64, ptr getelementptr inbounds (%struct.description, ptr @model_description, i64 0, i32 9), align 8
  %conv.i = trunc i64 %0 to i32
  %cmp1 = icmp sgt i32 %conv.i, %output
  %tobool = icmp ne ptr %shape, null
  %or.cond = and i1 %tobool, %cmp1
  br i1 %or.cond, label %if.end, label %return

if.end:
  %conv = zext i32 %output to i64
  %1 = load i64, ptr getelementptr inbounds (%struct.description, ptr @model_description, i64 0, i32 12), align 8
  %add.ptr.i.i = getelementptr inbounds i8, ptr @model_description, i64 %1
  %add.ptr.i = getelementptr inbounds %struct.output, ptr %add.ptr.i.i, i64 %conv
  %2 = load i64, ptr %add.ptr.i, align 8
  %cmp418.not = icmp eq i64 %2, 0
  br i1 %cmp418.not, label %for.cond.cleanup, label %for.body

for.cond.cleanup:
  %conv9 = trunc i64 %2 to i32
  br label %return

for.body:
  %axis.019 = phi i64 [ %inc, %for.body ], [ 0, %if.end ]
  %arrayidx = getelementptr inbounds %struct.output, ptr %add.ptr.i, i64 0, i32 1, i64 %axis.019
  %3 = load i64, ptr %arrayidx, align 8
  %arrayidx7 = getelementptr inbounds i64, ptr %shape, i64 %axis.019
  store i64 %3, ptr %arrayidx7, align 8
  %inc = add nuw i64 %axis.019, 1
  %exitcond.not = icmp eq i64 %inc, %2
  br i1 %exitcond.not, label %for.cond.cleanup, label %for.body

return:
  %retval.0 = phi i32 [ %conv9, %for.cond.cleanup ], [ 0, %lor.lhs.false ], [ 0, %entry ]
  ret i32 %retval.0
}

define i64 @model_input_size(i32 %input) nounwind {
entry:
  %shape = alloca [8 x i64], align 16
  %cmp.i = icmp slt i32 %input, 0
  %0 = load i64, ptr getelementptr inbounds (%struct.description, ptr @model_description, i64 0, i32 8), align 8
  %conv.i.i = trunc i64 %0 to i32
  %cmp1.i = icmp sle i32 %conv.i.i, %input
  %or.cond.not = select i1 %cmp.i, i1 true, i1 %cmp1.i
  br i1 %or.cond.not, label %cond.end, label %for.cond.preheader.i

for.cond.preheader.i:
  %conv.i = zext i32 %input to i64
  %1 = load i64, ptr getelementptr inbounds (%struct.description, ptr @model_description, i64 0, i32 11), align 8
  %add.ptr.i.i.i = getelementptr inbounds i8, ptr @model_description, i64 %1
  %add.ptr.i.i = getelementptr inbounds %struct.input, ptr %add.ptr.i.i.i, i64 %conv.i
  br label %for.body.i

for.body.i:
  %indvars.iv.i = phi i64 [ 0, %for.cond.preheader.i ], [ %indvars.iv.next.i, %for.body.i ]
  %arrayidx.i = getelementptr inbounds [3 x i64], ptr %add.ptr.i.i, i64 0, i64 %indvars.iv.i
  %2 = load i64, ptr %arrayidx.i, align 8
  %arrayidx7.i = getelementptr inbounds i64, ptr %shape, i64 %indvars.iv.i
  store i64 %2, ptr %arrayidx7.i, align 8
  %indvars.iv.next.i = add nuw nsw i64 %indvars.iv.i, 1
  %exitcond.not.i = icmp eq i64 %indvars.iv.next.i, 3
  br i1 %exitcond.not.i, label %model_input_shape.exit, label %for.body.i

model_input_shape.exit:
  br i1 %or.cond.not, label %cond.end, label %cond.true

cond.true:
  %3 = load i64, ptr %shape, align 16
  %arrayidx1 = getelementptr inbounds [8 x i64], ptr %shape, i64 0, i64 1
  %4 = load i64, ptr %arrayidx1, align 8
  %mul = mul nsw i64 %4, %3
  %arrayidx2 = getelementptr inbounds [8 x i64], ptr %shape, i64 0, i64 2
  %5 = load i64, ptr %arrayidx2, align 16
  %mul3 = mul nsw i64 %mul, %5
  br label %cond.end

cond.end:
  %cond = phi i64 [ %mul3, %cond.true ], [ 0, %model_input_shape.exit ], [ 0, %entry ]
  ret i64 %cond
}

define i64 @model_output_size(i32 %output) nounwind {
entry:
  %shape = alloca [8 x i64], align 16
  %cmp = icmp sgt i32 %output, -1
  %0 = load i64, ptr getelementptr inbounds (%struct.description, ptr @model_description, i64 0, i32 9), align 8
  %conv.i = trunc i64 %0 to i32
  %cmp1.not = icmp sgt i32 %conv.i, %output
  %or.cond = select i1 %cmp, i1 %cmp1.not, i1 false
  br i1 %or.cond, label %if.end.i, label %cleanup

if.end.i:
  %conv.i10 = zext i32 %output to i64
  %1 = load i64, ptr getelementptr inbounds (%struct.description, ptr @model_description, i64 0, i32 12), align 8
  %add.ptr.i.i.i = getelementptr inbounds i8, ptr @model_description, i64 %1
  %add.ptr.i.i = getelementptr inbounds %struct.output, ptr %add.ptr.i.i.i, i64 %conv.i10
  %2 = load i64, ptr %add.ptr.i.i, align 8
  %cmp418.not.i = icmp eq i64 %2, 0
  br i1 %cmp418.not.i, label %for.cond.cleanup.i, label %for.body.i

for.cond.cleanup.i:
  %conv9.i = trunc i64 %2 to i32
  %cmp311 = icmp sgt i32 %conv9.i, 0
  br i1 %cmp311, label %for.body.preheader, label %cleanup

for.body.preheader:
  %wide.trip.count = and i64 %2, 4294967295
  br label %for.body

for.body.i:
  %axis.019.i = phi i64 [ %inc.i, %for.body.i ], [ 0, %if.end.i ]
  %arrayidx.i = getelementptr inbounds %struct.output, ptr %add.ptr.i.i, i64 0, i32 1, i64 %axis.019.i
  %3 = load i64, ptr %arrayidx.i, align 8
  %arrayidx7.i = getelementptr inbounds i64, ptr %shape, i64 %axis.019.i
  store i64 %3, ptr %arrayidx7.i, align 8
  %inc.i = add nuw i64 %axis.019.i, 1
  %exitcond.not.i = icmp eq i64 %inc.i, %2
  br i1 %exitcond.not.i, label %for.cond.cleanup.i, label %for.body.i

for.body:
  %indvars.iv = phi i64 [ 0, %for.body.preheader ], [ %indvars.iv.next, %for.body ]
  %size.012 = phi i64 [ 1, %for.body.preheader ], [ %mul, %for.body ]
  %arrayidx = getelementptr inbounds [8 x i64], ptr %shape, i64 0, i64 %indvars.iv
  %4 = load i64, ptr %arrayidx, align 8
  %mul = mul nsw i64 %4, %size.012
  %indvars.iv.next = add nuw nsw i64 %indvars.iv, 1
  %exitcond.not = icmp eq i64 %indvars.iv.next, %wide.trip.count
  br i1 %exitcond.not, label %cleanup, label %for.body

cleanup:
  %retval.0 = phi i64 [ 0, %entry ], [ 1, %for.cond.cleanup.i ], [ %mul, %for.body ]
  ret i64 %retval.0
}

declare i32 @posix_memalign(ptr noundef, i64 noundef, i64 noundef)

declare ptr @memset(ptr noundef, i32 noundef, i64 noundef)

declare i32 @open(ptr noundef, i32 noundef, ...)

declare i64 @lseek(i32 noundef, i64 noundef, i32 noundef)

declare ptr @mmap(ptr noundef, i64 noundef, i32 noundef, i32 noundef, i32 noundef, i64 noundef)

declare i32 @close(i32 noundef)

declare i32 @memcmp(ptr noundef, ptr noundef, i64 noundef)

declare i32 @sched_getaffinity(i32 noundef, i64 noundef, ptr noundef)

declare i32 @madvise(ptr noundef, i64 noundef, i32 noundef)

declare i32 @pthread_attr_init(ptr noundef)

declare i32 @pthread_attr_setstacksize(ptr noundef, i64 noundef)

declare i32 @pthread_sigmask(i32 noundef, ptr noundef, ptr noundef)

declare i32 @pthread_create(ptr noundef, ptr noundef, ptr noundef, ptr noundef)

define internal noalias ptr @run_worker(ptr %pool) nounwind {
entry:
  tail call void @pool_worker(ptr %pool)
  ret ptr null
}

declare i32 @pthread_attr_destroy(ptr noundef)

declare void @pool_worker(ptr noundef)

declare i64 @llvm.umin.i64(i64, i64)
